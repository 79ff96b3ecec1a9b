import json
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from captioning import json_stream
from captioning.json_stream import stream_lists

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


class Slow:
    """A file of which no more than a few characters are read at once."""

    def __init__(self, file: object, size: int):
        self.file, self.size = file, size

    def read(self, _: int) -> str:
        return self.file.read(self.size)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(st.sampled_from(["a", "b", "c"]) | st.text(), VALUES, max_size=5),
    st.integers(1, 9),
    st.sampled_from([None, 2]),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
)
def test_the_entries_are_those_of_the_whole_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: dict, size: int, indent: int | None, encoding: str
):
    path = tmp_path / "file.json"
    path.write_bytes(json.dumps(content, indent=indent, ensure_ascii=False).encode(encoding, "surrogatepass"))
    whole = {name: value for name, value in content.items() if name in ("a", "b") and isinstance(value, list)}
    with monkeypatch.context() as patch:
        init = json_stream._Text.__init__
        patch.setattr(json_stream._Text, "__init__", lambda self, file: init(self, Slow(file, size)))
        found: dict[str, list] = {}
        for name, number, entry in stream_lists(path, ("a", "b")):
            if number >= 0:
                assert number == len(found[name])
                found[name].append(entry)
            else:
                found[name] = []
    assert found == whole


NO_JSON = """{ {"a" {"a": {"a":[ {"a":[1 {"a":[1,]} {"a":[1:2]} {"a":[] {"a":[]}1 [1 {1:2} {"a":1,} {"a"1} nothing"""


@pytest.mark.parametrize("text", ["", *NO_JSON.split(" "), '{"a": ["x]}'])
def test_what_is_no_json_is_said_with_its_place(tmp_path: Path, text: str):
    (tmp_path / "file.json").write_text(text)
    with pytest.raises(ValueError, match=r": character \d+"):
        list(stream_lists(tmp_path / "file.json", ("a",)))


def test_a_long_list_takes_the_memory_of_its_entries(tmp_path: Path):
    path = tmp_path / "file.json"
    with open(path, "w") as file:
        file.write('{"info": {}, "annotations": [')
        file.writelines(json.dumps({"id": i, "caption": "a dog runs on the beach"}) + "," for i in range(100_000))
        file.write('{"id": 0}]}')
    tracemalloc.start()
    try:
        count = sum(number >= 0 for _, number, _ in stream_lists(path, ("annotations",)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 100_001
    assert peak < 5e6 < path.stat().st_size
