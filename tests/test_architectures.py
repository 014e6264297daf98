"""Every architecture of the table in docs/compatibility.md trains as `transformers` computes it, and others use what it
learnt; or it is refused by name before its weights are read.

The table's engines start in some 0.3 s each, because they run eagerly and have a small cache.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, Idefics3Config
from vllm import SamplingParams
from vllm.config import set_current_vllm_config
from vllm.lora.layers import ColumnParallelLinearWithLoRA, MergedColumnParallelLinearVariableSliceWithLoRA
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers.linear import MergedColumnParallelLinear

from tests import scores
from tests.architectures import (
    BASE,
    EXPERTS,
    HEAD_IS_EMBEDDINGS,
    LARGE_VOCABULARY,
    LESS_USED,
    OPTIONS,
    TRAINABLE,
    WITHOUT_LORA,
    make,
    make_whole,
)
from tests.engines import SENTIMENT, Engines, reviews, worker_of
from tests.reference import ReferenceTrainer
from tests.tiny import SENTENCES, make_tokenizer
from vllm_zo import LLM, LanguageModeling, LoZO
from vllm_zo.data import BatchOrder, encode_examples
from vllm_zo.entrypoints.llm.options import engine_options
from vllm_zo.errors import ConfigError, JobError
from vllm_zo.worker.find_head import find_head
from vllm_zo.worker.lora_targets import choose, modules_here

OBJECTIVE = LanguageModeling(prompt_field="sentence", completion_field="sentence")
"""Every token of the whole vocabulary counts, so a soft cap or a scale of the logits shows."""
STEPS, BATCH, SEED, EPS = 3, 4, 3, 1e-2
METHOD = LoZO(rank=2, interval=2, eps=EPS)
RATE = 1e-2
LOSS_TOLERANCE = 5e-4
"""Two orders of summation in float32: some 1e-5 of losses of size 7, and a step's direction divides that by 2 EPS."""
VISIBLE = 10 * scores.TOLERANCE
"""Nats that training must move some token by."""
TINY: dict[str, Any] = {
    "enforce_eager": True, "num_gpu_blocks_override": 64, "max_num_batched_tokens": 512, "max_num_seqs": 32,
}  # fmt: skip


@pytest.mark.parametrize("name", [*TRAINABLE, *(pytest.param(name, marks=pytest.mark.slow) for name in LESS_USED)])
def test_it_trains_as_transformers_computes_it_and_others_use_what_it_learnt(
    engines: Engines, name: str, tmp_path: Path
) -> None:
    model = make_whole(tmp_path / "model", *(TRAINABLE | LESS_USED)[name])
    options = OPTIONS.get(name, {})
    engines.add(f"table of architectures: {name}", model)
    llm = engines.get(f"table of architectures: {name}", **TINY)
    rows = reviews(12, seed=1)
    run, answers = trained(llm, model, rows, tmp_path, **options)

    tokenizer = AutoTokenizer.from_pretrained(model)
    choices = encode_examples(rows, SENTIMENT, tokenizer, 128, "rows")
    expected = reference(llm, model, SENTIMENT).score(choices)[0].mean().item()
    assert llm.evaluate(rows, SENTIMENT)["loss"] == pytest.approx(expected, abs=LOSS_TOLERANCE)
    run.save_merged(tmp_path / "merged")
    merged = load(llm, tmp_path / "merged")
    assert scores.of_transformers(merged, model) == pytest.approx(answers, abs=scores.TOLERANCE)
    assert served_tokens(llm, run) == tokens_of(merged, tokenizer)


def trained(
    llm: Any, model: Path, rows: list[dict[str, Any]], tmp_path: Path, **options: Any
) -> tuple[Any, list[float]]:
    """A run whose every step was that of the reference, and what the engine serves with it, which `peft` and vLLM
    compute from the saved adapter too."""
    run = llm.finetune(
        rows,
        objective=OBJECTIVE,
        method=METHOD,
        learning_rate=RATE,
        batch_size=BATCH,
        steps=STEPS,
        seed=SEED,
        bases=2,
        progress=False,
        **options,
    )
    oracle = reference(llm, model, OBJECTIVE, **options)
    examples = encode_examples(rows, OBJECTIVE, AutoTokenizer.from_pretrained(model), 128, "rows")
    order = BatchOrder(len(examples), BATCH, SEED)
    for step, record in enumerate(run.history):
        losses, _ = oracle.step(step, [examples[i] for i in order.batch(step)], RATE)
        assert record["loss"] == pytest.approx(losses.mean().item(), abs=LOSS_TOLERANCE), f"step {step}"
    answers = scores.of_vllm(llm, model, lora_request=run.lora_request)
    assert max(abs(a - b) for a, b in zip(answers, scores.of_vllm(llm, model), strict=True)) > VISIBLE
    run.save(tmp_path / "adapter")
    tuned = PeftModel.from_pretrained(load(llm, model), tmp_path / "adapter")
    assert scores.of_transformers(tuned, model) == pytest.approx(answers, abs=scores.TOLERANCE)
    from_file = LoRARequest("from-file", 9_000, str(tmp_path / "adapter"))
    assert scores.of_vllm(llm, model, lora_request=from_file) == pytest.approx(answers, abs=scores.TOLERANCE)
    return run, answers


HEADS_OFTEN_TRAINED = ("opt 350m", "llama", "qwen2", "qwen3", *LARGE_VOCABULARY)
WITH_HEAD = {
    name: recipe
    for name, recipe in (TRAINABLE | LESS_USED | LARGE_VOCABULARY).items()
    if name not in HEAD_IS_EMBEDDINGS
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in HEADS_OFTEN_TRAINED else pytest.mark.slow) for name in WITH_HEAD],
)
def test_its_head_alone_trains_likewise(engines: Engines, name: str, tmp_path: Path) -> None:
    model = make_whole(tmp_path / "model", *WITH_HEAD[name])
    engines.add(f"heads: {name}", model)
    trained(engines.get(f"heads: {name}", **TINY), model, reviews(12, seed=1), tmp_path, target_modules="lm_head")


def test_a_head_that_is_the_embeddings_is_refused_with_the_reason(engines: Engines, tmp_path: Path) -> None:
    engines.add("heads: gemma 2", make_whole(tmp_path, *TRAINABLE["gemma 2"]))
    with pytest.raises(JobError, match="target_modules='lm_head': vLLM has no adapters .*embeddings are its head"):
        engines.get("heads: gemma 2", **TINY).finetune(
            reviews(4), objective=SENTIMENT, target_modules="lm_head", steps=1, batch_size=2
        )


def reference(llm: Any, model: Path, objective: Any, **options: Any) -> ReferenceTrainer:
    return ReferenceTrainer(
        load(llm, model), METHOD, objective, job_seed=SEED, update_space="bank", num_bases=2, **options
    )


def load(llm: Any, directory: Path) -> Any:
    # vLLM's Transformers backend changes the classes of `transformers`: they ask for the configuration of an engine.
    # "eager", because only that attention has Gemma 2's soft cap.
    with set_current_vllm_config(llm.llm_engine.vllm_config):
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


PROMPTS = [" ".join(sentence.split()[:5]) for sentence in SENTENCES[:3]]


def served_tokens(llm: Any, run: Any) -> list[list[int]]:
    """What the engine writes with the run's adapter, and that its texts are these tokens'."""
    outputs = llm.generate(
        PROMPTS, SamplingParams(temperature=0.0, max_tokens=8), lora_request=run.lora_request, use_tqdm=False
    )
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    for output, ids in zip(outputs, tokens, strict=True):
        # The last character may lack bytes: the engine holds it back.
        decoded = llm.get_tokenizer().decode(ids, skip_special_tokens=True).rstrip("\ufffd")
        assert output.outputs[0].text.rstrip("\ufffd") == decoded
    return tokens


def tokens_of(model: Any, tokenizer: Any) -> list[list[int]]:
    tokens = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer(prompt).input_ids])
        written = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8)
        tokens.append(written[0, ids.shape[1] :].tolist())
    return tokens


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_are_refused_on_a_cpu_before_weights_are_read(name: str, tmp_path: Path) -> None:
    directory = make(tmp_path, *EXPERTS[name])
    with pytest.raises(ConfigError, match=rf"model='{directory}': \w+ForCausalLM is a mixture of experts"):
        engine_options(str(directory), True, {})


@pytest.mark.parametrize("name", WITHOUT_LORA)
def test_a_model_without_lora_is_refused_before_weights_are_read(name: str, tmp_path: Path) -> None:
    directory = make(tmp_path, *WITHOUT_LORA[name])
    with pytest.raises(ConfigError, match=rf"model='{directory}': \w+ has no LoRA support"):
        LLM(str(directory), zo_training=True)


def test_a_module_in_another_form_than_the_checkpoints_is_refused_by_name(engines: Engines, tmp_path: Path) -> None:
    """`peft` would load such an adapter without a word, and leave the module out."""
    engines.add("glm 4 whole", make_whole(tmp_path, *TRAINABLE["glm 4"]))
    with pytest.raises(JobError, match=r"model\.layers\.0\.mlp\.gate_proj is no module of the checkpoint"):
        engines.get("glm 4 whole", **TINY).finetune(reviews(4), objective=SENTIMENT, steps=1, batch_size=2)


@pytest.mark.slow  # vLLM inspects the class in a process of its own
def test_a_model_that_reads_more_than_text_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    text = {"model_type": "llama", **BASE}
    vision = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    name = "Idefics3ForConditionalGeneration"
    config = Idefics3Config(text_config=text, vision_config=vision, architectures=[name])
    config.save_pretrained(directory := tmp_path)
    make_tokenizer(directory, "<s>")
    with pytest.raises(ConfigError, match=rf"model='{directory}': {name} reads more than text"):
        LLM(str(directory), zo_training=True)


def test_a_model_that_vllm_has_dropped_is_refused_by_name(tmp_path: Path) -> None:
    directory = make(tmp_path, "LlamaConfig", BASE, "<s>")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"architectures": ["BaichuanForCausalLM"]}))
    with pytest.raises(ValueError, match="BaichuanForCausalLM"):
        LLM(str(directory), zo_training=True)


# --- parts ------------------------------------------------------------------------------------------------------------


def test_the_head_is_what_the_models_own_logits_use(engines: Engines) -> None:
    model = worker_of(engines.get()).model_runner.get_model()
    found = find_head(model, 64, torch.float32, torch.device("cpu"))
    assert found.lm_head is model.lm_head and found.processor is model.logits_processor


class Changed(torch.nn.Module):
    """A model that does something between its hidden states and its head (MiMo has a norm there), or behind it."""

    def __init__(self, inner: torch.nn.Module, before: float, after: float) -> None:
        super().__init__()
        self.inner, self.before, self.after = inner, before, after

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.inner.compute_logits(hidden * self.before)  # type: ignore[operator]
        return logits if self.after == 1 else logits * self.after


class Own(torch.nn.Linear):
    """A model whose logits come from no logits processor."""

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self(hidden)  # type: ignore[no-any-return]


def test_a_head_that_alone_gives_other_logits_is_refused_by_name(engines: Engines) -> None:
    model = worker_of(engines.get()).model_runner.get_model()
    assert find_head(Changed(model, 1, 1), 64, torch.float32, torch.device("cpu")).lm_head is model.lm_head
    for before, after in ((2, 1), (1, 2)):
        with pytest.raises(ConfigError, match="Changed changes the hidden states before its LM head or the logits"):
            find_head(Changed(model, before, after), 64, torch.float32, torch.device("cpu"))
    assert "forward" not in vars(model.logits_processor), "the model is left as it was"
    with pytest.raises(ConfigError, match="Own computes its logits in a way of its own"):
        find_head(Own(64, 8), 64, torch.float32, torch.device("cpu"))


def test_a_module_of_which_only_a_part_could_be_trained_is_refused_by_name(engines: Engines) -> None:
    config = engines.get().llm_engine.vllm_config
    with set_current_vllm_config(config):
        merged = MergedColumnParallelLinear(32, [32, 32, 64], bias=False, prefix="model.layers.0.in_proj")
        pair = MergedColumnParallelLinear(32, [32, 32], bias=False, prefix="model.layers.0.gate_up_proj")
    three, one = MergedColumnParallelLinearVariableSliceWithLoRA(merged), ColumnParallelLinearWithLoRA(pair)
    for layer in (three, one):
        layer.create_lora_weights(2, config.lora_config)

    def manager(name: str, layer: Any) -> Any:
        return SimpleNamespace(model=object(), modules={f"model.layers.0.{name}": layer}, packed_modules_mapping={})

    with pytest.raises(ConfigError, match=r"in_proj is 1 module\(s\) of the checkpoint and 3 slices of vLLM's layer"):
        choose(modules_here(manager("in_proj", three)), "all-linear")
    (shape,) = choose(modules_here(manager("gate_up_proj", one)), "all-linear")
    assert shape.out_features == 64
    one.tp_size = 2
    with pytest.raises(ConfigError, match=r"gate_up_proj is merged already .* tensor_parallel_size=2 cuts it in piec"):
        choose(modules_here(manager("gate_up_proj", one)), "all-linear")
