"""Where records come from, what is wrong with them, and which of them a step sees."""

from __future__ import annotations

import builtins
import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tiny import make_tokenizer

from vllm_zo.data import BatchOrder, encode_examples, load_examples, sample_split
from vllm_zo.errors import ConfigError
from vllm_zo.objectives import Classification, LanguageModeling

RECORDS = [{"sentence": "a film of great charm", "label": 1}, {"sentence": 'dull , or "slow"', "label": 0}]
Write = Callable[[str, str | bytes], Path]
OBJECTIVE = Classification("{sentence} It was", [" terrible", " great"])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_file(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write_file


# --- files ------------------------------------------------------------------------------------------------------------


def test_jsonl_gives_its_objects_in_order(write: Write) -> None:
    path = write("a.jsonl", "\n".join(map(json.dumps, RECORDS)) + "\n\n")
    assert load_examples(path, "train") == load_examples(str(path), "train") == RECORDS


def test_jsonl_may_begin_with_a_byte_order_mark_and_hold_line_separators_inside_strings(write: Write) -> None:
    path = write(
        "a.jsonl", b"\xef\xbb\xbf" + json.dumps({"sentence": "a\u2028b"}, ensure_ascii=False).encode() + b"\r\n"
    )
    assert load_examples(path, "train") == [{"sentence": "a\u2028b"}]


def test_csv_gives_texts_under_the_names_of_its_header(write: Write) -> None:
    path = write("a.CSV", 'sentence, label\n"one, two\nthree ""four""",1\n\nfive,0\n')
    expected = [{"sentence": 'one, two\nthree "four"', "label": "1"}, {"sentence": "five", "label": "0"}]
    assert load_examples(path, "train") == expected


def test_labels_of_a_csv_file_mean_what_they_mean_in_jsonl(write: Write, tokenizer: Any) -> None:
    rows = "sentence,label\na film of great charm,1\n"
    from_csv = encode_examples(load_examples(write("a.csv", rows), "train"), OBJECTIVE, tokenizer, 64, "a.csv")
    assert from_csv == encode_examples(RECORDS[:1], OBJECTIVE, tokenizer, 64, "records")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", r"train='.*a\.jsonl': no examples in it"),
        ("a.jsonl", "\n \n", r"train='.*a\.jsonl': no examples in it"),
        (
            "a.jsonl",
            '{"a": 1}\n{"a": ',
            r"a\.jsonl, line 2: not valid JSON .*the file ends in the middle of this record",
        ),
        ("a.jsonl", '{"a": 1}\n{"a": \n{"a": 2}\n', r"a\.jsonl, line 2: not valid JSON .*write one object a line"),
        ("a.jsonl", "[\n{}\n]\n", r"a\.jsonl, line 1: not valid JSON .*write one object a line"),
        ("a.jsonl", '{"a": 1}\n[1, 2]\n', r"a\.jsonl, line 2: expected a JSON object, found list \[1, 2\]"),
        ("a.jsonl", '{"a": 1}\nnull\n', r"a\.jsonl, line 2: expected a JSON object, found NoneType"),
        ("a.jsonl", "[" * 100_000, r"a\.jsonl, line 1: not valid JSON"),
        (
            "a.jsonl",
            b'{"a": 1}\n{"a": "caf\xe9"}\n',
            r"a\.jsonl, line 2: not UTF-8 \(byte 0xe9 at offset 19\); convert",
        ),
        ("a.jsonl", '{"a": 1}'.encode("utf-16"), r"a\.jsonl, line 1: not UTF-8 \(byte 0xff at offset 0\)"),
        ("a.csv", b"a,b\ncaf\xe9,1\n", r"a\.csv, line 2: not UTF-8"),
        ("a.csv", "", r"train='.*a\.csv': no examples in it"),
        ("a.csv", "sentence,label\n", r"train='.*a\.csv': no examples in it"),
        ("a.csv", "a charming film,1\ndull,0\n", r"a\.csv, line 1: \['a charming film', '1'\] is not a header"),
        ("a.csv", "sentence,\ndull,0\n", r"a\.csv, line 1: .* is not a header; the first line must name the columns"),
        ("a.csv", "a,a\ndull,0\n", r"a\.csv, line 1: .* is not a header"),
        ("a.csv", "sentence,label\none, two,0\n", r"a\.csv, line 2: 3 columns, the header has 2; .*double quotes"),
        ("a.csv", "sentence,label\none,1\ntwo\n", r"a\.csv, line 3: 1 columns, the header has 2"),
        ("a.csv", 'sentence,label\n"one,1\ntwo,0\n', r"a\.csv, line 3: not valid CSV \(unexpected end of data\)"),
        ("a.txt", "a", r"train='.*a\.txt': expected a file that ends in \.jsonl or \.csv, or hf:<data set>"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_the_line(
    name: str, content: str | bytes, message: str, write: Write
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_examples(write(name, content), "train")


def test_a_missing_file_is_named_with_the_place_that_was_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=rf"validation='dev\.jsonl': no such file \(looked in {tmp_path}\)"):
        load_examples("dev.jsonl", "validation")


def test_a_directory_is_not_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").mkdir()
    with pytest.raises(ConfigError, match=r"train='.*a\.jsonl': cannot be read: Is a directory"):
        load_examples(tmp_path / "a.jsonl", "train")


# --- objects and Hugging Face data sets -------------------------------------------------------------------------------


def test_any_iterable_of_dictionaries_will_do() -> None:
    assert load_examples(RECORDS, "train") == load_examples(iter(RECORDS), "train") == RECORDS
    copies = load_examples(RECORDS, "train")
    assert copies[0] is not RECORDS[0]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], r"train='list': no examples"),
        ([{"a": 1}, "b"], "train, row 2: expected a dictionary, found str 'b'"),
        ({"train": RECORDS, "test": RECORDS}, "train is a mapping with keys 'train', 'test': give one split"),
        (3, "train=3: expected a path, hf:"),
        (None, "train=None: expected a path, hf:"),
    ],
)
def test_an_object_that_holds_no_records_is_refused(source: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_examples(source, "train")


@pytest.mark.parametrize(
    ("source", "call"),
    [
        ("hf:glue:sst2:train", ("glue", "sst2", "train")),
        ("hf:stanfordnlp/sst2:validation", ("stanfordnlp/sst2", None, "validation")),
        ("hf:nyu-mll/glue:sst2:train[:1000]", ("nyu-mll/glue", "sst2", "train[:1000]")),
    ],
)
def test_a_hugging_face_name_becomes_data_set_configuration_and_split(
    source: str, call: tuple[str, str | None, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def load_dataset(path: str, name: str | None, *, split: str) -> list[Mapping[str, Any]]:
        calls.append((path, name, split))
        return RECORDS

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert load_examples(source, "train") == RECORDS
    assert calls == [call]


@pytest.mark.parametrize("source", ["hf:glue", "hf:", "hf:glue:sst2:train:more", "hf::train"])
def test_a_hugging_face_name_without_its_parts_is_refused(source: str) -> None:
    with pytest.raises(ConfigError, match=rf"train='{source}': expected hf:<data set>.*as in hf:glue:sst2:train"):
        load_examples(source, "train")


def test_what_the_hub_says_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("the hub cannot be reached")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(ConfigError, match="train='hf:a:train': cannot be loaded: the hub cannot be reached"):
        load_examples("hf:a:train", "train")


def test_a_missing_datasets_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def without_datasets(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "datasets":
            raise ModuleNotFoundError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_datasets)
    with pytest.raises(ConfigError, match=r"`datasets` is not installed; pip install 'vllm-zo\[datasets\]'"):
        load_examples("hf:glue:sst2:train", "train")


# --- encoding ---------------------------------------------------------------------------------------------------------


def test_examples_are_encoded_in_order(tokenizer: Any) -> None:
    encoded = encode_examples(RECORDS, OBJECTIVE, tokenizer, 64, "train.jsonl")
    assert encoded == [OBJECTIVE.encode(record, tokenizer, "") for record in RECORDS]


def test_one_bad_row_is_named(tokenizer: Any) -> None:
    records = [*RECORDS, {"text": "dull", "label": 0}]
    message = r"^train\.jsonl, row 3: no field 'sentence'; the record has 'text', 'label'\.$"
    with pytest.raises(ConfigError, match=message):
        encode_examples(records, OBJECTIVE, tokenizer, 64, "train.jsonl")


def test_of_many_bad_rows_the_first_are_listed_and_all_are_counted(tokenizer: Any) -> None:
    records = [{"sentence": "dull", "label": i % 4} for i in range(40)]
    with pytest.raises(ConfigError) as caught:
        encode_examples(records, OBJECTIVE, tokenizer, 64, "train.jsonl")
    lines = str(caught.value).splitlines()
    assert lines[0] == "train.jsonl: 20 of 40 rows cannot be used:"
    assert [line.split(":")[0] for line in lines[1:-1]] == [f"  train.jsonl, row {n}" for n in (3, 4, 7, 8, 11)]
    assert lines[-1] == "  ... and 15 more"


def test_a_prompt_may_fill_the_model_up_to_the_token_that_vllm_samples(tokenizer: Any) -> None:
    length = len(OBJECTIVE.encode(RECORDS[0], tokenizer, "").rows[0].token_ids)
    encode_examples(RECORDS[:1], OBJECTIVE, tokenizer, length + 1, "train.jsonl")
    message = rf"train\.jsonl, row 1: {length} tokens, the limit is {length - 1} \(max_model_len={length} less the one"
    with pytest.raises(ConfigError, match=message):
        encode_examples(RECORDS[:1], OBJECTIVE, tokenizer, length, "train.jsonl")


def test_the_longest_row_of_an_example_counts(tokenizer: Any) -> None:
    objective = Classification("{sentence} It was", [" great", " terrible from start to end"])
    lengths = [len(row.token_ids) for row in objective.encode(RECORDS[0], tokenizer, "").rows]
    assert lengths[0] < lengths[1]
    with pytest.raises(ConfigError, match=f"row 1: {lengths[1]} tokens, the limit is {lengths[0]} "):
        encode_examples(RECORDS[:1], objective, tokenizer, lengths[0] + 1, "train.jsonl")


def test_no_examples_is_an_error(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=r"^dev: no examples\.$"):
        encode_examples([], LanguageModeling(), tokenizer, 64, "dev")


# --- order and split --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_examples", "batch_size"), [(10, 5), (10, 3), (7, 7), (5, 1), (16, 15)])
def test_every_example_comes_once_an_epoch(num_examples: int, batch_size: int) -> None:
    order = BatchOrder(num_examples, batch_size, seed=3)
    epochs = 4
    steps = -(-epochs * num_examples // batch_size)
    stream = [i for step in range(steps) for i in order.batch(step)]
    for epoch in range(epochs):
        part = stream[epoch * num_examples : (epoch + 1) * num_examples]
        assert Counter(part) == Counter(range(num_examples))
    assert all(len(order.batch(step)) == batch_size for step in range(steps))


def test_any_step_is_computed_alone() -> None:
    forward = [BatchOrder(13, 4, seed=5).batch(step) for step in range(40)]
    backward = [BatchOrder(13, 4, seed=5).batch(step) for step in reversed(range(40))]
    assert forward == backward[::-1]


def test_epochs_and_seeds_shuffle_differently() -> None:
    orders = {BatchOrder(50, 50, seed).batch(epoch) for seed in (0, 1, 2) for epoch in (0, 1, 2)}
    assert len(orders) == 9


def test_the_order_is_frozen() -> None:
    """A recorded order: a change here would make every saved run impossible to resume or replay."""
    order = BatchOrder(10, 4, seed=0)
    assert [order.batch(step) for step in (0, 2, 100)] == [(5, 7, 9, 2), (4, 8, 3, 4), (9, 6, 2, 4)]


def test_each_position_of_an_epoch_is_uniform_over_the_examples() -> None:
    """600 epochs of 6 examples: counts are Binomial(600, 1/6), standard deviation 9.1; the bound is 5 of them."""
    orders = np.array([BatchOrder(6, 6, seed=1).batch(epoch) for epoch in range(600)])
    counts = np.stack([np.bincount(column, minlength=6) for column in orders.T])
    assert np.abs(counts - 100).max() < 46


@pytest.mark.parametrize(
    ("batch_size", "message"),
    [
        (11, "batch_size=11: the training data has 10 examples; use a smaller batch or more data"),
        (0, "batch_size=0: expected an integer >= 1"),
        (2.0, r"batch_size=2\.0: expected an integer"),
    ],
)
def test_a_batch_that_the_data_cannot_fill_is_refused(batch_size: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BatchOrder(10, batch_size, seed=0)


def test_a_split_takes_the_rows_of_the_papers() -> None:
    """MeZO's `sample_subset` after `np.random.seed`: training from the front of the permutation, then development."""
    records = [{"id": i} for i in range(40)]
    np.random.seed(13)
    expected = np.random.permutation(40)[:15].tolist()
    train, validation = sample_split(records, (10, 5), data_seed=13)
    assert [r["id"] for r in train] == expected[:10]
    assert [r["id"] for r in validation] == expected[10:]


@pytest.mark.parametrize(
    ("sizes", "data_seed", "message"),
    [
        ((8, 3), 0, r"sizes=\(8, 3\): 11 rows wanted, the data has 10"),
        ((8, 0), 0, "sizes=0: expected an integer >= 1"),
        ((8, 2), -1, "data_seed=-1: expected an integer from 0 to 4294967295"),
    ],
)
def test_a_split_the_data_cannot_give_is_refused(sizes: tuple[int, ...], data_seed: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sample_split([{}] * 10, sizes, data_seed)
