"""Where records come from, what is wrong with them, and which of them a step sees."""

from __future__ import annotations

import builtins
import gzip
import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.tokenizers_of import byte_level
from vllm_zo.data import BatchOrder, encode_examples, load_examples, sample_split
from vllm_zo.errors import ConfigError
from vllm_zo.objectives import Classification, LanguageModeling, Reward

RECORDS = [{"sentence": "a film of great charm", "label": 1}, {"sentence": 'dull , or "slow"', "label": 0}]
Write = Callable[[str, str | bytes], Path]
OBJECTIVE = Classification("{sentence} It was", [" terrible", " great"])


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
        (
            "a.txt",
            "a",
            r"train='.*a\.txt': expected a file that ends in \.jsonl, \.json, .*and \.gz\), or hf:<data set>",
        ),
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


def test_files_of_windows_programs_may_be_joined(write: Write) -> None:
    path = write("a.jsonl", b'\xef\xbb\xbf{"a": 1}\r\n\xef\xbb\xbf{"a": 2}\n\xef\xbb\xbf\n')
    with pytest.raises(ConfigError, match=r"a\.jsonl, line 3: not valid JSON"):
        load_examples(path, "train")
    path = write("b.jsonl", b'\xef\xbb\xbf{"a": 1}\r\n\xef\xbb\xbf{"a": 2}\n')
    assert load_examples(path, "train") == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"text": "what a day \ud83d"},
            r"field 'text': half a character \(.*U\+D83D\) at position 11; write",
        ),
        ({"a": [{"b": "\udc00"}]}, r"field 'a'\[0\]\.b: half a character .*U\+DC00\) at position 0"),
        ({"\ud83d": 1}, r", a name of a field: half a character"),
    ],
)
def test_half_a_character_is_named_with_its_row_field_and_position(
    record: dict[str, Any], message: str, write: Write
) -> None:
    whole = {"text": "what a day \U0001f600 é"}
    path = write("a.jsonl", "\n".join(map(json.dumps, [whole, record])))
    with pytest.raises(ConfigError, match=rf"a\.jsonl, line 2{message}" if message[0] == "," else message) as caught:
        load_examples(path, "train")
    assert "a.jsonl, line 2, " in str(caught.value)
    with pytest.raises(ConfigError, match=message) as caught:
        load_examples([whole, record], "train")
    assert str(caught.value).startswith("train, row 2, ")


# --- other kinds of files ---------------------------------------------------------------------------------------------


def test_a_json_file_is_a_list_of_objects(write: Write) -> None:
    assert load_examples(write("a.json", json.dumps(RECORDS, indent=1)), "train") == RECORDS
    for content, message in (
        ('[{"a": 1},\n {"a": }]', r"a\.json, line 2: not valid JSON .*ends in \.jsonl"),
        ('{"a": 1}\n{"a": 2}', r"a\.json, line 2: not valid JSON \(Extra data.*one object a line ends in \.jsonl"),
        ('{"a": 1}', r"a\.json: expected a list of JSON objects, found dict"),
        ('[{"a": 1}, 2]', r"a\.json, row 2: expected a dictionary, found int 2"),
        ("[]", r"a\.json'?: no examples in it"),
        (b'[{"a": "\xe9"}]', r"a\.json: not UTF-8"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_examples(write("a.json", content), "train")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_a_compressed_file_holds_what_the_plain_one_does(name: str, write: Write) -> None:
    content = {
        "a.jsonl": "\n".join(map(json.dumps, RECORDS)),
        "a.json": json.dumps(RECORDS),
        "a.csv": "sentence,label\na film of great charm,1\n",
    }[name].encode()
    whole = gzip.compress(content)
    assert load_examples(write(f"{name}.gz", whole), "train") == load_examples(write(name, content), "train")
    for damaged in (whole[:-4], content, whole[:12] + b"\x00" * 8 + whole[20:]):
        with pytest.raises(ConfigError, match=rf"train='.*{name}\.gz': not a whole gzip file"):
            load_examples(write(f"{name}.gz", damaged), "train")


def test_a_data_frame_is_its_rows(tokenizer: Any) -> None:
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    frame = pandas.DataFrame(RECORDS, index=[7, 3])
    assert load_examples(frame, "train") == RECORDS
    assert encode_examples(load_examples(frame, "train"), OBJECTIVE, tokenizer, 64, "train")[0].gold == 1
    with pytest.raises(ConfigError, match=r"train, row 2: field 'sentence' has no value"):
        gap = pandas.DataFrame([RECORDS[0], {"sentence": None, "label": 0}])
        encode_examples(load_examples(gap, "train"), OBJECTIVE, tokenizer, 64, "train")
    with pytest.raises(ConfigError, match="no examples"):
        load_examples(frame[:0], "train")


def test_a_data_frame_of_polars_is_its_rows() -> None:
    polars = pytest.importorskip("polars", reason="polars is not installed")
    assert load_examples(polars.DataFrame(RECORDS), "train") == RECORDS


def test_parquet_arrow_and_feather_files_and_tables_are_their_rows(tmp_path: Path, write: Write) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import feather, parquet

    nested = [{**record, "messages": [{"role": "user", "content": "a"}], "tags": ["x"]} for record in RECORDS]
    table = pyarrow.Table.from_pylist(nested)
    parquet.write_table(table, tmp_path / "a.parquet")
    feather.write_feather(table, tmp_path / "a.feather")
    with pyarrow.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    for source in (table, *(tmp_path / name for name in ("a.parquet", "a.feather", "a.arrow"))):
        assert load_examples(source, "train") == nested
    for damaged in (b"PAR1 and nothing else", b"ARROW1", b"hello"):
        with pytest.raises(ConfigError, match=r"a\.parquet: cannot be read as Parquet or Arrow: "):
            load_examples(write("a.parquet", damaged), "train")


def test_a_missing_pyarrow_is_named_with_its_remedy(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"a\.parquet: the package `pyarrow` is not .*pip install 'vllm-zo\[arrow\]'"):
        load_examples(write("a.parquet", "PAR1"), "train")


# --- objects and Hugging Face data sets -------------------------------------------------------------------------------


def test_any_iterable_of_dictionaries_will_do() -> None:
    assert load_examples(RECORDS, "train") == load_examples(iter(RECORDS), "train") == RECORDS
    copies = load_examples(RECORDS, "train")
    assert copies[0] is not RECORDS[0]


def test_what_data_frames_hold_is_taken_as_json_would_hold_it(tokenizer: Any) -> None:
    class NAType: ...

    frame = [
        {"sentence": "a film", "label": np.int64(1), "scores": np.array([0.5, 1.0])},
        {"sentence": "dull", "label": np.float64(0.0), "scores": NAType()},
    ]
    records = load_examples(frame, "train")
    assert records == [
        {"sentence": "a film", "label": 1, "scores": [0.5, 1.0]},
        {"sentence": "dull", "label": 0.0, "scores": None},
    ]
    assert [e.gold for e in encode_examples(records, OBJECTIVE, tokenizer, 64, "train")] == [1, 0]


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
    length = len(OBJECTIVE.encode(RECORDS[0], tokenizer, "").sequences[0].token_ids)
    encode_examples(RECORDS[:1], OBJECTIVE, tokenizer, length + 1, "train.jsonl")
    message = rf"train\.jsonl, row 1: {length} tokens, the limit is {length - 1} \(max_model_len={length} less the one"
    with pytest.raises(ConfigError, match=message):
        encode_examples(RECORDS[:1], OBJECTIVE, tokenizer, length, "train.jsonl")


def test_the_longest_row_of_an_example_counts(tokenizer: Any) -> None:
    objective = Classification("{sentence} It was", [" great", " terrible from start to end"])
    lengths = [len(row.token_ids) for row in objective.encode(RECORDS[0], tokenizer, "").sequences]
    assert lengths[0] < lengths[1]
    with pytest.raises(ConfigError, match=f"row 1: {lengths[1]} tokens, the limit is {lengths[0]} "):
        encode_examples(RECORDS[:1], objective, tokenizer, lengths[0] + 1, "train.jsonl")


@pytest.mark.parametrize("mode", ["single-token", "full"])
def test_rows_that_are_too_long_are_left_out_or_cut_and_counted(
    mode: Any, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    objective = Classification("{sentence} It was", [" terrible", " great"], mode=mode)
    long = {"sentence": " ".join(["a film of great charm"] * 3), "label": 1}
    records = [RECORDS[0], long, RECORDS[1], long]
    whole = [objective.encode(record, tokenizer, "") for record in records]
    limit = max(len(sequence.token_ids) for short in (whole[0], whole[2]) for sequence in short.sequences) + 1
    with pytest.raises(ConfigError, match=r"row 2: .* or set on_long to drop or truncate-left\."):
        encode_examples(records, objective, tokenizer, limit, "t")
    dropped = encode_examples(records, objective, tokenizer, limit, "t", on_long="drop")
    assert dropped == [whole[0], whole[2]]
    cut = encode_examples(records, objective, tokenizer, limit, "t", on_long="truncate-left")
    assert [cut[0], cut[2]] == [whole[0], whole[2]]
    for shorter, sequence in zip(cut[1].sequences, whole[1].sequences, strict=True):
        assert len(shorter.token_ids) == limit - 1 and shorter.token_ids[0] == sequence.token_ids[0]
        assert shorter.token_ids[1:] == sequence.token_ids[2 - limit :]
        assert shorter.label_ids == sequence.label_ids
        assert [shorter.token_ids[p] for p in shorter.positions] == [sequence.token_ids[p] for p in sequence.positions]
    for done in ("left out", "cut from the left"):
        assert f"t: 2 of 4 rows are too long for max_model_len={limit} and {done} (row 2, 4)" in caplog.messages
    with pytest.raises(ConfigError, match=r"^t: every row is too long for max_model_len=4; raise it"):
        encode_examples(records, objective, tokenizer, 4, "t", on_long="drop")


def test_a_row_is_cut_down_to_its_first_token_and_no_further(tokenizer: Any) -> None:
    long = {"prompt": "a film of great charm", "completion": " dull , or slow", "sentence": "a film of great charm"}
    learnt = LanguageModeling(append_eos=False)
    (sequence,) = learnt.encode(long, tokenizer, "").sequences
    scored = len(sequence.positions)
    (cut,) = encode_examples([long], learnt, tokenizer, scored + 1, "t", on_long="truncate-left")
    assert cut.sequences[0].token_ids == (sequence.token_ids[0], *sequence.token_ids[1 - scored :])
    assert cut.sequences[0].positions == tuple(range(scored))
    with pytest.raises(ConfigError, match=r"t, row 1: the prompt is \d+ tokens too long for .* and has only \d+"):
        encode_examples([long], learnt, tokenizer, scored, "t", on_long="truncate-left")
    asks = Reward("{sentence}", reward="contains", max_tokens=4)
    (asked,) = encode_examples([long], asks, tokenizer, 6, "t", on_long="truncate-left")
    assert len(asked.sequences[0].token_ids) == 2
    with pytest.raises(ConfigError, match="shorten what it scores or writes"):
        encode_examples([long], asks, tokenizer, 4, "t", on_long="truncate-left")


def test_a_whole_text_is_learnt_but_for_its_first_token(tmp_path: Path, tokenizer: Any) -> None:
    text = "a film of great charm"
    for some in (tokenizer, byte_level(tmp_path)):
        ids = some(text)["input_ids"]
        (sequence,) = LanguageModeling(append_eos=False).encode({"text": text, "id": 3}, some, "").sequences
        assert (sequence.token_ids, sequence.label_ids) == (tuple(ids[:-1]), tuple(ids[1:]))
        assert sequence.positions == tuple(range(len(ids) - 1))
    (ended,) = LanguageModeling().encode({"text": text}, tokenizer, "").sequences
    assert ended.label_ids[-1] == tokenizer.eos_token_id
    with pytest.raises(ConfigError, match="t: field 'text' is empty"):
        LanguageModeling().encode({"text": " "}, tokenizer, "t")
    with pytest.raises(ConfigError, match="no field 'completion'"):
        LanguageModeling().encode({"text": text, "prompt": "a"}, tokenizer, "t")


def test_no_examples_is_an_error(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=r"^dev: no examples\.$"):
        encode_examples([], LanguageModeling(), tokenizer, 64, "dev")


def test_a_token_that_the_model_has_not_is_named(tmp_path: Path) -> None:
    tokenizer = byte_level(tmp_path, more=("<|extra|>",))
    size = len(tokenizer) - 1
    where = rf"train, row 1: .*'<\|extra\|>' \(id {size}\), the model has {size} tokens"
    scored = Classification("{sentence} It was", [" terrible", "<|extra|>"])
    read = [{"sentence": "a <|extra|> film", "label": 0}]
    for objective, records in ((scored, RECORDS), (OBJECTIVE, read), (Reward("{sentence}", reward="contains"), read)):
        with pytest.raises(ConfigError, match=where):
            encode_examples(records[:1], objective, tokenizer, 64, "train", size)
        encode_examples(records[:1], objective, tokenizer, 64, "train", size + 1)
    pinned = Classification("{sentence} It was", [" terrible", " great"], bos_token_id=999_999)
    with pytest.raises(ConfigError, match=f"^bos_token_id=999999: the model has {size} tokens, up to id {size - 1};"):
        encode_examples(RECORDS, pinned, tokenizer, 64, "train", size)


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
