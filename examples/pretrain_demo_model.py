r"""Pretrain the small OPT model that the demo fine-tunes (plain torch and Hugging Face; vLLM is not involved).

Zeroth-order fine-tuning starts from a pretrained model, and a demo that runs on any laptop needs one of a few
megabytes. One process trains it with AdamW in float32, in two phases:

1. Language model: the next-token loss over the corpus, in blocks of 256 tokens.
2. Verdicts: the loss on snippets of one or two review sentences followed by a prompt and a verdict, such as "...
   Rating: excellent". Half the weight stays on the language-model loss. So the model gets the sentiment features that
   larger models get from more text. The corpus has no labels. Reviews that state a rating ("8/10") or a stock verdict
   ("waste of time", "highly recommended") train a bag-of-words classifier, which does not see those words. Snippets on
   which it is sure become the training pairs. The training never shows the demo's own prompt, " It was" with
   " terrible" or " great".

The corpus is JSON lines, `{"text": ...}`, plain or .xz. One slow core without AVX-512 trains on about 1,100 tokens a
second, 4 million an hour, and labels the snippets in four minutes. To continue an interrupted run from its last
checkpoint, start it again with the same arguments.

    python examples/pretrain_demo_model.py \
        --corpus reviews.jsonl.xz --init examples/demo/model --output my-model --minutes 60
"""

import argparse
import json
import lzma
import math
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

BLOCK_TOKENS = 256
BLOCKS_PER_STEP = 8
SNIPPETS_PER_STEP = 32
CHECKPOINT_EVERY_S = 180.0
PAD, EOS = 1, 2

# Prompt, verdict of a negative snippet, verdict of a positive one. Each verdict is a single token.
PROMPTS = [
    (" Overall this is", " bad", " good"),
    (" Rating:", " poor", " excellent"),
    (" I", " hated", " loved"),
    (" A", " boring", " wonderful"),
    (" The film was", " awful", " wonderful"),
    (" I found it", " dull", " brilliant"),
    (" In short:", " stupid", " perfect"),
]

RATING = re.compile(r"(?<![\d/.])(\d{1,2}(?:\.\d)?)\s?(?:/|out of)\s?(?:10|ten)\b", re.IGNORECASE)
PRAISE = re.compile(
    r"highly recommend(?:ed)?|a must[- ]see|one of the best (?:films|movies)|i loved (?:this|it)|is a masterpiece"
    r"|10 stars|well worth (?:seeing|watching)",
    re.IGNORECASE,
)
BLAME = re.compile(
    r"wast(?:e|ed|ing) (?:of|your|my) (?:time|money)|one of the worst|worst (?:movie|film)|avoid this"
    r"|avoid at all costs|stay away|i hated (?:this|it)|don't bother",
    re.IGNORECASE,
)
ABOUT_A_FILM = re.compile(r"\b(?:this|the) (?:movie|film|show|series|episode)\b", re.IGNORECASE)
WORD = re.compile(r"[a-z]+(?:'[a-z]+)?")
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    texts = read_corpus(args.corpus)

    if args.init == "none":
        tokenizer = train_tokenizer(texts)
        model = OPTForCausalLM(demo_config())
    else:
        tokenizer = AutoTokenizer.from_pretrained(args.init)
        model = OPTForCausalLM.from_pretrained(args.init, dtype=torch.float32)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(texts):,} documents")

    if args.minutes:
        blocks = tokenise_blocks(texts, tokenizer, args.output / "blocks.npy", args.seed)
        held_out, blocks = blocks[:64], blocks[64:]
        train(
            "lm",
            model,
            lm_batches(blocks, args.seed),
            args.minutes * 60,
            args.lr,
            args.output,
            lambda: lm_loss(model, held_out),
        )
    if args.tune_minutes:
        cache = args.output / "snippets.json"
        if not cache.exists():
            cache.write_text(json.dumps(label_snippets(texts, args.seed)))
        snippets = json.loads(cache.read_text())
        held_out, snippets = snippets[:500], snippets[500:]
        batches = verdict_batches(snippets, tokenizer, args.seed)
        train(
            "tune",
            model,
            batches,
            args.tune_minutes * 60,
            args.tune_lr,
            args.output,
            lambda: verdict_accuracy(model, tokenizer, held_out),
        )

    model.to(torch.bfloat16).save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    print(f"saved in {args.output}; blocks.npy, snippets.json and *.pt there are only for resuming")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="JSON lines with a field `text`, plain or .xz")
    parser.add_argument(
        "--init", default="none", help="folder of a model to continue from, or `none` to start from random weights"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the model and the checkpoints")
    parser.add_argument(
        "--minutes", type=float, default=60, help="language-model training, wall clock; 0 leaves it out"
    )
    parser.add_argument("--tune-minutes", type=float, default=10, help="verdict training, wall clock; 0 leaves it out")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate of the language-model phase")
    parser.add_argument("--tune-lr", type=float, default=3e-4, help="peak learning rate of the verdict phase")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


# The model and its tokenizer


def demo_config() -> OPTConfig:
    """A model of 6.97 M parameters, which take 13.9 MB in bfloat16."""
    return OPTConfig(
        vocab_size=8192,
        hidden_size=256,
        word_embed_proj_dim=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        ffn_dim=1024,
        max_position_embeddings=512,
        dropout=0.0,
        pad_token_id=PAD,
        bos_token_id=EOS,
        eos_token_id=EOS,
    )


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 8,192 entries with OPT's special ids. A text starts with </s>, as for OPT."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(
        vocab_size=8192, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", EOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="</s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=512,
    )


# The training loop, shared by both phases


def train(
    phase: str,
    model: OPTForCausalLM,
    batches: Iterator[tuple[Tensor, Tensor]],
    budget_s: float,
    peak_lr: float,
    output: Path,
    evaluate: Callable[[], str],
) -> None:
    """Train with AdamW, a short warm-up and a cosine decay over `budget_s` seconds. Resumes from `output`/`phase`.pt.

    A batch is (tokens, weights), both (sequences, tokens). `weights` says how much the prediction of each token counts.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    path, step, spent_s, average = output / f"{phase}.pt", 0, 0.0, None
    if path.exists():
        state = torch.load(path)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent_s = state["step"], state["spent_s"]
        print(f"{phase}: carries on after step {step}, {spent_s / 60:.1f} minutes")
        # The batches follow from the seed: skip those that the interrupted run has seen.
        for _ in range(step):
            next(batches)
    saved_s = spent_s
    while spent_s < budget_s:
        start = time.perf_counter()
        decay = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * spent_s / budget_s))
        optimizer.param_groups[0]["lr"] = peak_lr * min(1, (step + 1) / 50) * decay
        tokens, weights = next(batches)
        loss = weighted_loss(model, tokens, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        took_s = time.perf_counter() - start
        spent_s += took_s
        average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
        if step % 50 == 0:
            speed = f"{tokens.numel() / took_s:,.0f} tokens/s"
            print(f"{phase} step {step:5d}  {spent_s / 60:5.1f} min  loss {average:.3f}  {speed}", flush=True)
        if spent_s - saved_s > CHECKPOINT_EVERY_S or spent_s >= budget_s:
            saved_s = spent_s
            print(f"{phase} step {step:5d}  held-out: {evaluate()}", flush=True)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "spent_s": spent_s}
            # A rename is atomic: an interrupt during the write leaves the old checkpoint whole.
            torch.save(state, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)


def weighted_loss(model: OPTForCausalLM, tokens: Tensor, weights: Tensor) -> Tensor:
    """Sum of weight * cross-entropy (nats) over the predicted tokens; the head runs only where the weight is not 0."""
    hidden = model.model.decoder(input_ids=tokens, attention_mask=(tokens != PAD).long()).last_hidden_state
    targets, weights = tokens[:, 1:], weights[:, 1:]
    counted = weights > 0
    logits = model.lm_head(hidden[:, :-1][counted])
    return (F.cross_entropy(logits, targets[counted], reduction="none") * weights[counted]).sum()


# Phase 1: language model


def read_corpus(path: Path) -> list[str]:
    with lzma.open(path, "rt") if path.suffix == ".xz" else path.open() as file:
        return [json.loads(line)["text"] for line in file]


def tokenise_blocks(texts: list[str], tokenizer: PreTrainedTokenizerFast, cache: Path, seed: int) -> np.ndarray:
    """(blocks, BLOCK_TOKENS) uint16: the documents one after the other, three in ten of them in treebank spacing."""
    if not cache.exists():
        rng = random.Random(seed)
        ids = []
        for i in range(0, len(texts), 1000):
            batch = [treebank_style(text) if rng.random() < 0.3 else text for text in texts[i : i + 1000]]
            ids += [np.array(row, np.uint16) for row in tokenizer(batch)["input_ids"]]
        flat = np.concatenate(ids)
        blocks = flat[: len(flat) // BLOCK_TOKENS * BLOCK_TOKENS].reshape(-1, BLOCK_TOKENS)
        np.save(cache, np.random.default_rng(seed).permutation(blocks))
    return np.load(cache)


def lm_batches(blocks: np.ndarray, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    rng = np.random.default_rng(seed + 1)
    while True:
        order = rng.permutation(len(blocks))
        for i in range(0, len(order) - BLOCKS_PER_STEP, BLOCKS_PER_STEP):
            tokens = torch.from_numpy(blocks[order[i : i + BLOCKS_PER_STEP]].astype(np.int64))
            yield tokens, torch.full(tokens.shape, 1 / (BLOCKS_PER_STEP * (BLOCK_TOKENS - 1)))


@torch.no_grad()
def lm_loss(model: OPTForCausalLM, blocks: np.ndarray) -> str:
    tokens = torch.from_numpy(blocks.astype(np.int64))
    losses = [
        weighted_loss(model, rows, torch.full(rows.shape, 1 / (len(rows) * (BLOCK_TOKENS - 1)))).item()
        for rows in tokens.split(8)
    ]
    return f"{sum(losses) / len(losses):.3f} nats a token"


def treebank_style(text: str) -> str:
    """Lower case with spaces round the punctuation, as treebanks print sentences: "It's fun." -> "it 's fun ."."""
    text = re.sub(r"n't\b", " n't", text.lower())
    text = re.sub(r"(\w)('(?:s|re|ve|ll|d|m)\b)", r"\1 \2", text)
    return re.sub(r"\s+", " ", re.sub(r"(\.\.\.|[.,!?;:()\"])", r" \1 ", text)).strip()


# Phase 2: verdicts


def label_snippets(texts: list[str], seed: int) -> list[tuple[str, int]]:
    """Snippets of one or two sentences with a label (0 negative, 1 positive), half of each, shuffled.

    The label of a review is the verdict that it states, else that of the classifier if it is sure. A snippet takes the
    label of its review if the classifier, reading the snippet alone, agrees. Half of the snippets have treebank style.
    """
    rng = random.Random(seed)
    stated = [stated_verdict(text) for text in texts]
    weights, bias = fit_bag_of_words(
        [(words_of(text), label) for text, label in zip(texts, stated, strict=True) if label is not None]
    )
    by_label: dict[int, list[str]] = {0: [], 1: []}
    for text, label in zip(texts, stated, strict=True):
        if label is None and ABOUT_A_FILM.search(text):
            score = bag_score(words_of(text), weights, bias)
            label = int(score > 0) if abs(score) > 1 else None
        if label is None:
            continue
        sentences = SENTENCE_END.split(text)
        for _ in range(2):
            first = rng.randrange(len(sentences))
            snippet = " ".join(sentences[first : first + rng.randint(1, 2)]).strip()
            score = bag_score(words_of(snippet), weights, bias)
            if 3 <= len(snippet.split()) <= 30 and abs(score) > 0.2 and (score > 0) == bool(label):
                by_label[label].append(treebank_style(snippet) if rng.random() < 0.5 else snippet)
    unique = [sorted(set(by_label[label])) for label in (0, 1)]
    each = min(map(len, unique))
    snippets = [(snippet, label) for label in (0, 1) for snippet in rng.sample(unique[label], each)]
    rng.shuffle(snippets)
    print(f"{len(snippets):,} snippets; {Counter(stated)} stated verdicts")
    return snippets


def stated_verdict(text: str) -> int | None:
    """1 for a rating of 7 to 10 out of ten or stock praise, 0 for 0 to 4 or stock blame, None for neither or both."""
    ratings = [value for value in map(float, RATING.findall(text)) if value <= 10]
    if ratings:
        return 1 if min(ratings) >= 7 else 0 if max(ratings) <= 4 else None
    praise, blame = bool(PRAISE.search(text)), bool(BLAME.search(text))
    return None if praise == blame else int(praise)


def words_of(text: str) -> set[str]:
    """The words and the pairs of neighbouring words of a text, without its stock verdicts."""
    for stated in (RATING, PRAISE, BLAME):
        text = stated.sub(" ", text)
    words = WORD.findall(text.lower().replace(" n't", "n't"))
    return set(words) | {f"{first} {second}" for first, second in pairwise(words)}


def fit_bag_of_words(labelled: list[tuple[set[str], int]]) -> tuple[dict[str, float], float]:
    """Fit a logistic regression over `words_of` by two epochs of Adam. It is right on 88 % of 1,500 unseen reviews."""
    counts = Counter(feature for features, _ in labelled for feature in features)
    index = {feature: i for i, feature in enumerate(sorted(f for f, count in counts.items() if count >= 5))}
    rows = [torch.tensor(sorted(index[f] for f in features if f in index)) for features, _ in labelled]
    labels = torch.tensor([float(label) for _, label in labelled])
    weight, bias = torch.zeros(len(index), 1, requires_grad=True), torch.zeros((), requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], lr=0.01)
    for _ in range(2):
        for chosen in torch.randperm(len(rows)).split(64):
            bags = [rows[i] for i in chosen]
            lengths = torch.tensor([len(bag) for bag in bags])
            sums = F.embedding_bag(torch.cat(bags), weight, lengths.cumsum(0) - lengths, mode="sum").squeeze(1)
            loss = F.binary_cross_entropy_with_logits(sums / lengths.clamp(min=1).sqrt() + bias, labels[chosen])
            (loss + 1e-5 * weight.square().sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
    return dict(zip(index, weight.detach().squeeze(1).tolist(), strict=True)), bias.item()


def bag_score(features: set[str], weights: dict[str, float], bias: float) -> float:
    """The log-odds that a text is positive."""
    # Over the root of the number of words, as in `fit_bag_of_words`, so that length alone makes no score larger.
    known = [weights[feature] for feature in features if feature in weights]
    return sum(known) / math.sqrt(max(1, len(known))) + bias


def verdict_batches(
    snippets: list[tuple[str, int]], tokenizer: PreTrainedTokenizerFast, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of snippets with one prompt each. Half the loss is on the verdicts, half on the text of a quarter of the
    snippets."""
    rng = random.Random(seed + 2)
    while True:
        rng.shuffle(snippets)
        for i in range(0, len(snippets) - SNIPPETS_PER_STEP, SNIPPETS_PER_STEP):
            texts = []
            for snippet, label in snippets[i : i + SNIPPETS_PER_STEP]:
                prompt, *verdicts = rng.choice(PROMPTS)
                texts.append(snippet + prompt + verdicts[label])
            rows = [torch.tensor(row) for row in tokenizer(texts, truncation=True, max_length=128)["input_ids"]]
            tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
            weights = torch.zeros(tokens.shape)
            text_tokens = sum(len(row) - 2 for row in rows[: SNIPPETS_PER_STEP // 4])
            for number, row in enumerate(rows):
                if number < SNIPPETS_PER_STEP // 4:
                    weights[number, 1 : len(row) - 1] = 0.5 / text_tokens
                weights[number, len(row) - 1] = 0.5 / SNIPPETS_PER_STEP
            yield tokens, weights


@torch.no_grad()
def verdict_accuracy(model: OPTForCausalLM, tokenizer: PreTrainedTokenizerFast, snippets: list[tuple[str, int]]) -> str:
    """For each prompt, the share of held-out snippets whose right verdict has a larger logit than the wrong one."""
    found = []
    for prompt, *verdicts in PROMPTS:
        pair = torch.tensor([tokenizer(verdict, add_special_tokens=False)["input_ids"][0] for verdict in verdicts])
        right = 0
        for i in range(0, len(snippets), 50):
            rows = [torch.tensor(row) for row in tokenizer([s + prompt for s, _ in snippets[i : i + 50]])["input_ids"]]
            tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
            hidden = model.model.decoder(input_ids=tokens, attention_mask=(tokens != PAD).long()).last_hidden_state
            last = hidden[torch.arange(len(rows)), torch.tensor([len(row) - 1 for row in rows])]
            guesses = model.lm_head(last)[:, pair].argmax(1)
            right += (guesses == torch.tensor([label for _, label in snippets[i : i + 50]])).sum().item()
        found.append(f"{prompt.strip()} {right / len(snippets):.3f}")
    return ", ".join(found)


if __name__ == "__main__":
    main()
