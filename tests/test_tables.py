"""Tables of captions in many forms, imported: images 0.jpg to 5.jpg, captioned "a red ball" unless a row says more."""

import json
import re
from pathlib import Path

import pytest
from test_importers import all_captions, captions, csv_rows, json_rows, lines, make_image, six, text

import importers
from captioning.captions import MAX_CAPTION, clean_caption
from captioning.errors import InputError

HUGGING_FACE = json_rows(file_name="{}.jpg", text="a red ball")
ROWS = json_rows(photo="{}.jpg", caption="a red ball")
SEVERAL = json_rows(photo="{}.jpg", caption=["a red ball", "one ball"])
WIDE = csv_rows("image,caption_1,caption_2,caption3", "{}.jpg,a red ball,one ball,the ball")

ONE, TWO, THREE = ["a red ball"], ["a red ball", "one ball"], ["a red ball", "one ball", "the ball"]
FORMS = {
    "Hugging Face's metadata.jsonl": ("metadata__jsonl", lines(HUGGING_FACE), ONE),
    "Hugging Face's metadata.csv": ("metadata__csv", csv_rows("file_name,text"), ONE),
    "JSON array": ("c__json", json.dumps(ROWS), ONE),
    "indented JSON array": ("c__json", json.dumps(ROWS, indent=1), ONE),
    "array in .jsonl": ("c__jsonl", json.dumps(ROWS), ONE),
    "JSON Lines in .json": ("c__json", lines(ROWS), ONE),
    "JSON object from names to captions": ("c__json", json.dumps({f"{i}.jpg": TWO for i in range(6)}), TWO),
    "JSON object from names to rows": (
        "c__json",
        json.dumps({f"{i}.jpg": [{"text": "a red ball"}, {"text": "one ball"}] for i in range(6)}),
        TWO,
    ),
    "JSON object from names to rows and texts": (
        "c__json",
        json.dumps({f"{i}.jpg": [{"caption": "a red ball", "id": i}] if i % 2 else "a red ball" for i in range(6)}),
        ONE,
    ),
    "a bar in a quoted cell": ("c__csv", csv_rows("image|caption", '{}.jpg|"red | blue"'), ["red | blue"]),
    "an unclosed quotation mark in a whole row between bars": (
        "c__csv",
        csv_rows("image|caption|number", '{}.jpg|"a red ball|0'),
        ['"a red ball'],
    ),
    "an inch mark in a short row between bars": (
        "c__csv",
        csv_rows("image|caption|split", '{}.jpg|a red ball of 5"'),
        ['a red ball of 5"'],
    ),
    "JSON object from names to one row each": (
        "c__json",
        json.dumps({f"{i}.jpg": {"captions": TWO} for i in range(6)}),
        TWO,
    ),
    "JSON object from names without suffix to rows": (
        "c__json",
        json.dumps({f"{i}": [{"text": "a red ball"}] for i in range(6)}),
        ONE,
    ),
    "JSON object from numbers to rows": (
        "c__json",
        json.dumps({str(5 - i): row for i, row in enumerate(json_rows(image="{}.jpg", caption="ball {}"))}),
        ["ball {}"],
    ),
    "JSON object with a list of rows for every kind of scene, as NWPU-Captions": (
        "c__json",
        json.dumps({str(i): [{"filename": f"{i}.jpg", "raw": "a red ball", "split": "val"}] for i in range(6)}),
        ONE,
    ),
    "JSON object with a list of rows and the splits that they name": (
        "c__json",
        json.dumps({"data": [{**row, "split": "val"} for row in ROWS], "splits": {"train": ["x"], "val": ["0.jpg"]}}),
        ONE,
    ),
    "JSON object with a list of rows": (
        "c__json",
        json.dumps({"version": 1, "tags": ["a"], "licenses": [{"id": 1}], "data": ROWS}),
        ONE,
    ),
    "images with their captions": ("c__json", json.dumps({"images": HUGGING_FACE}), ONE),
    "annotations with their images' names": ("c__json", json.dumps({"annotations": ROWS}), ONE),
    "list of captions": ("c__jsonl", lines(SEVERAL), TWO),
    "captions": ("c__jsonl", lines(json_rows(photo="{}.jpg", captions=TWO)), TWO),
    "caption_1, caption_2, caption3": ("c__csv", WIDE, THREE),
    "caption, caption, caption": ("c__csv", WIDE.replace("_1", "").replace("_2", "").replace("n3", "n"), THREE),
    "a space after the comma": ("c__csv", csv_rows("image, caption, source", '{}.jpg, "a red ball", me'), ONE),
    "a comma in quotes after a space": (
        "c__csv",
        csv_rows("image, caption, source", '{}.jpg, "a ball, red", me'),
        ["a ball, red"],
    ),
    "a list in a cell": ("c__csv", csv_rows("filename,raw", '{}.jpg,"[""a red ball"", ""one ball""]"'), TWO),
    "a Python list in a cell": ("c__csv", csv_rows("filename,raw", "{}.jpg,\"['a red ball', 'one ball']\""), TWO),
    "an array of numpy in a cell": (
        "c__csv",
        csv_rows("filename,raw", '{}.jpg,"[\'a red ball\' ""one ball""\n \'the ball\']"'),
        THREE,
    ),
    "a tuple in a cell": ("c__csv", csv_rows("filename,raw", "{}.jpg,\"('a red ball', 'one ball')\""), TWO),
    "words in brackets that Python knows": ("c__csv", csv_rows("filename,raw", "{}.jpg,[not None]"), ["[not None]"]),
    "a comma in a column's name": (
        "c__csv",
        csv_rows('image,"notes, if any",caption,source', "{}.jpg,x,a red ball,me"),
        ONE,
    ),
    "a pipe in quotes": ("c__csv", csv_rows("image|caption", '{}.jpg|"a red | ball"'), ["a red | ball"]),
    "several texts of Label Studio": (
        "c__csv",
        csv_rows("annotator,caption,image", '1,"{{""text"":[""a red ball"",""one ball""]}}",{}.jpg'),
        TWO,
    ),
    "several texts of Label Studio in JSON": (
        "c__json",
        json.dumps([{"image": f"{i}.jpg", "caption": {"text": TWO}} for i in range(6)]),
        TWO,
    ),
    "a description and a comment on it": (
        "c__csv",
        csv_rows("filename,description,comment", "{}.jpg,a red ball,checked"),
        ONE,
    ),
    "brackets are no list": ("c__csv", csv_rows("filename,caption", "{}.jpg,[a red ball]"), ["[a red ball]"]),
    "filename": ("c__csv", csv_rows("filename,caption"), ONE),
    "image, after pandas' index": ("c__csv", csv_rows(",image,caption", "7,{}.jpg,a red ball"), ONE),
    "two columns with the same image": ("c__csv", csv_rows("image,file_name,text", "{0}.jpg,{0}.jpg,a red ball"), ONE),
    "caption before text": ("c__csv", csv_rows("image,text,caption", "{}.jpg,OCR,a red ball"), ONE),
    "names without suffix": ("c__csv", csv_rows("image,caption", "{},a red ball"), ONE),
    "names from Windows": ("c__csv", csv_rows("image,caption", ".\\{}.jpg,a red ball"), ONE),
    "spaces": ("c__csv", csv_rows("image , caption", " {}.jpg ,  a red   ball "), ONE),
    "blank lines": ("c__csv", csv_rows("image,caption", "\r\n{}.jpg,a red ball\r\n,"), ONE),
    "lines of old Macs": ("c__csv", csv_rows("image,caption", end="\r"), ONE),
    "sep=; of Excel": ("c__csv", "sep=;\n" + csv_rows("image;caption", "{}.jpg;a red ball"), ONE),
    "TSV with a comma in its header": ("c__tsv", csv_rows("image\tcaption\tx,y", "{}.jpg\ta red ball\t1"), ONE),
    "a pipe and quotation marks": ("c__csv", csv_rows("image| caption", '{}.jpg| "a red ball"'), ONE),
    "doubled quotation marks": ("c__csv", csv_rows("image,caption", '{}.jpg,"a ""red"", ball"'), ['a "red", ball']),
    "doubled quotation marks in TSV": (
        "c__tsv",
        csv_rows("image\tcaption", '{}.jpg\t"a ""red"" ball"'),
        ['a "red" ball'],
    ),
    "marks within a cell": ("c__csv", csv_rows("image,caption", '{}.jpg,a "red" ball'), ['a "red" ball']),
    "an open mark in TSV": ("c__tsv", csv_rows("image\tcaption", '{}.jpg\t"a red ball'), ['"a red ball']),
    "a caption of two lines": (
        "c__csv",
        csv_rows("image,caption", '{}.jpg,"a red\nball, on grass"'),
        ["a red ball, on grass"],
    ),
    "a caption of two lines in Excel's Unicode text": (
        "c__tsv",
        csv_rows("image\tcaption", '{}.jpg\t"a red\nball"', "\r\n"),
        ONE,
    ),
    "a caption of two lines first": ("c__csv", csv_rows("caption,image", '"a red\nball",{}.jpg'), ONE),
    "a list of NumPy's texts": (
        "c__csv",
        csv_rows("image,caption", "{}.jpg,\"[np.str_('a red ball'), np.str_('one ball')]\""),
        TWO,
    ),
    "an array of NumPy": (
        "c__csv",
        csv_rows("image,caption", "{}.jpg,\"array(['a red ball', 'one ball'], dtype='<U10')\""),
        TWO,
    ),
    "a trailing separator": ("c__csv", csv_rows("image,caption,", "{}.jpg,a red ball,"), ONE),
    "an empty column of pandas": ("c__csv", csv_rows("image,caption,Unnamed: 2", "{}.jpg,a red ball,"), ONE),
    "a repeated image column": ("c__csv", csv_rows("image,caption,image", "{0}.jpg,a red ball,{0}.jpg"), ONE),
    "a line's end of Excel": ("c__csv", csv_rows("image,caption", "{}.jpg,a red_x000D_ ball_x000D_"), ONE),
    "columns about captions": (
        "c__jsonl",
        lines(json_rows(image="{}.jpg", caption="a red ball", caption_id=3, caption_date="2024", captioned=None)),
        ONE,
    ),
    "an index of pandas": ("c__csv", csv_rows(",image,caption", "3,{}.jpg,a red ball"), ONE),
    "a caption that is among the captions": (
        "c__jsonl",
        lines(json_rows(image="{}.jpg", caption="a ball", captions=["a ball", "a kite"])),
        ["a ball", "a kite"],
    ),
    "a caption beside other captions": (
        "c__jsonl",
        lines(json_rows(image="{}.jpg", caption="a ball", captions=["a kite", "a kite"])),
        ["a ball", "a kite", "a kite"],
    ),
    "captions in the lines of a cell": ("c__csv", csv_rows("image,captions", '{}.jpg,"a red ball\r\none ball"'), TWO),
    "captions in the lines of a JSON text": (
        "c__jsonl",
        lines(json_rows(image="{}.jpg", captions="\n".join(TWO))),
        TWO,
    ),
    "UTF-8 with a mark": ("c__csv", csv_rows("image,caption").encode("utf-8-sig"), ONE),
    "UTF-16": ("c__csv", csv_rows("image,caption").encode("utf-16"), ONE),
    "UTF-16, big end first": ("c__jsonl", b"\xfe\xff" + lines(ROWS).encode("utf-16-be"), ONE),
    "UTF-32": ("c__csv", csv_rows("image,caption").encode("utf-32"), ONE),
}
for mark in "\u2028\u2029\x85\x0b\x0c\x1c":
    FORMS[f"CSV with U+{ord(mark):04X}"] = ("c__csv", csv_rows("image,caption", f"{{}}.jpg,a red{mark}ball"), ONE)
    rows = json_rows(photo="{}.jpg", caption=f"a red{mark}ball")
    FORMS[f"JSON Lines with U+{ord(mark):04X}"] = (
        "c__jsonl",
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).replace("\\u001c", mark),
        ONE,
    )
    FORMS.pop("JSON Lines with U+001C", None)  # JSON allows none of these as they are
    FORMS.pop("JSON Lines with U+000B", None)
    FORMS.pop("JSON Lines with U+000C", None)


@pytest.mark.parametrize(("name", "content", "expected"), FORMS.values(), ids=FORMS)
def test_tables_of_many_forms_are_read(tmp_path, capsys, name, content, expected):
    importers.import_folder(six(tmp_path / "in", **{name: content}), tmp_path / "out")
    assert all_captions(tmp_path / "out") == {f"{i}.jpg": [text.format(i) for text in expected] for i in range(6)}
    assert (
        capsys.readouterr().err.removeprefix(
            f"all images of {tmp_path}/in are of other splits; there is none to train on\n"
        )
        == ""
    )


@pytest.mark.parametrize("mark", "\u2028\u2029\x85\x0b\x0c\x1c")
def test_only_line_feeds_and_carriage_returns_end_the_line_of_a_token_file(tmp_path, mark):
    tokens = "".join(f"{i}.jpg#0\ta red{mark}ball\r\n" for i in range(6))
    importers.import_flickr(six(tmp_path / "in", x__token__txt=tokens), tmp_path / "out")
    assert all_captions(tmp_path / "out") == {f"{i}.jpg": ONE for i in range(6)}


def test_an_encoding_is_that_of_the_files_that_are_not_in_utf_8(tmp_path):
    texts = {f"{i}__txt": "a ball" for i in range(4)} | {"4__txt": "a café".encode("cp1252"), "5__txt": "a naïve cat"}
    importers.import_folder(six(tmp_path / "in", **texts), tmp_path / "out", encoding="cp1252")
    assert all_captions(tmp_path / "out")["4.jpg"] == ["a café"]
    assert all_captions(tmp_path / "out")["5.jpg"] == ["a naïve cat"]


@pytest.mark.parametrize("encoding", ["utf-16-le", "iso2022_jp"])
def test_an_encoding_may_look_like_utf_8(encoding, tmp_path):
    table = csv_rows("image,caption", "{}.jpg,赤いボール" if encoding == "iso2022_jp" else "{}.jpg,a red ball")
    source = six(tmp_path / "in", c__csv=table.encode(encoding))
    importers.import_folder(source, tmp_path / "out", encoding=encoding)
    assert all_captions(tmp_path / "out")["0.jpg"] == (["赤いボール"] if encoding == "iso2022_jp" else ONE)


def test_an_encoding_can_be_named(tmp_path):
    table = csv_rows("image,caption", "{}.jpg,a café").encode("cp1252")
    source = six(tmp_path / "in", c__csv=table)
    with pytest.raises(InputError, match=r"c\.csv, line 2, is not UTF-8 text .* --encoding"):
        importers.import_folder(source, tmp_path / "out")
    with pytest.raises(InputError, match="cp125 is not a text encoding"):
        importers.import_folder(source, tmp_path / "out", encoding="cp125")
    importers.import_folder(source, tmp_path / "out", encoding="cp1252")
    assert all_captions(tmp_path / "out")["0.jpg"] == ["a café"]
    tokens = "".join(f"{i}.jpg#0\ta café\n" for i in range(6)).encode("cp1252")
    importers.import_flickr(six(tmp_path / "in", x__token=tokens), tmp_path / "flickr", encoding="cp1252")
    assert all_captions(tmp_path / "flickr")["0.jpg"] == ["a café"]


REFUSED = {
    **{
        f"a separator in a caption, {kind}": (
            "c__csv",
            csv_rows(header, row),
            r"c\.csv, line 2, has more columns than the header's [23]; put a caption .* in double quotes",
        )
        for kind, header, row in (
            ("unnamed last column", "image,caption,", "{}.jpg,a dog, brown"),
            ("two unnamed columns", "image;caption;;", "{}.jpg;a dog; brown;"),
            ("unnamed column of pandas", "image,caption,Unnamed: 2", "{}.jpg,a dog, brown"),
            ("unnamed column in the middle", "image,caption,,source", "{}.jpg,a dog, brown,web"),
        )
    },
    "a list with an open apostrophe in a cell": (
        "c__csv",
        csv_rows("image,caption", "{}.jpg,\"['a ball', 'it's one']\""),
        r"line 2, has a caption that is not text: \['a ball', 'it's one'\]",
    ),
    "numbers as text, among spaces": (
        "c__csv",
        csv_rows("image,caption", '{}.jpg," [""1"", 2] "'),
        r"line 2, has a caption that is not text: ",
    ),
    "a list as text in a list": (
        "c__jsonl",
        lines(json_rows(image="{}.jpg", caption=["['a ball', 'b']"])),
        r"line 1, has a caption that is not text: \['a ball', 'b'\]",
    ),
    "rows of one split beside the names of another": (
        "c__json",
        json.dumps({"train": ROWS[:4], "test": ["4.jpg", "5.jpg"]}),
        "holds rows in 'train' and 'test'; write one list, with a split in each row",
    ),
    "no header": ("c__csv", csv_rows("0.jpg,a red ball"), r"c\.csv, line 1, should name .* '0\.jpg,a red ball'"),
    "marks that join rows": (
        "c__csv",
        'image,caption\n0.jpg,a ball\n1.jpg,"stop is on the sign\n2.jpg,a cat\n3.jpg,a sign with stop"\n4.jpg,a dog\n',
        r"c\.csv, line 3, opens a quotation mark",
    ),
    "marks that join rows of other suffixes": (
        "c__csv",
        'image,caption\n0.jpg,a ball\n1.jpg,"stop is on the sign\n2.jpeg,a cat\n3.jpeg,stop"\n4.jpg,a dog\n',
        r"c\.csv, line 3, opens a quotation mark",
    ),
    "columns that differ in case": (
        "c__jsonl",
        '{"image": "0.jpg", "caption": "a ball", "Caption": "a kite"}',
        r"line 1, has two columns whose names differ in case",
    ),
    "marks that join rows without suffixes": (
        "c__csv",
        'caption,image\n"stop is on the sign,1\na sign with stop",2\n',
        r"c\.csv, line 2, opens a quotation mark",
    ),
    "a caption of two lines that may be a row": (
        "c__csv",
        csv_rows("image,caption", '{},"a red\nball, on grass"'),
        r"c\.csv, line 2, opens a quotation mark .* with spaces for the line breaks of a caption\.$",
    ),
    "two lists of rows": (
        "c__json",
        json.dumps({"train": ROWS, "val": ROWS}),
        r"c\.json holds rows in 'train' and 'val'; write one list, with a split in each row",
    ),
    "a list of rows without images": (
        "c__json",
        json.dumps({"version": 1, "data": [{"caption": "a red ball"}]}),
        r"c\.json, data\[0\], has no image",
    ),
    "a wrong row in a list of rows": (
        "c__json",
        json.dumps({"data": [*ROWS, {"photo": "0.jpg"}]}),
        r"c\.json, data\[6\], has no caption",
    ),
    "a name in another case": (
        "c__csv",
        csv_rows("image,caption", "{}.JPG,a ball"),
        r"line 2: 0\.JPG is not under .*/in \(there is 0\.jpg\); correct its name",
    ),
    "a name with another suffix": (
        "c__csv",
        csv_rows("image,caption", "{}.png,a ball"),
        r"line 2: 0\.png is not under .*/in \(there is 0\.jpg\); correct its name",
    ),
    "a quoted word first": (
        "c__csv",
        csv_rows("image,caption", '{}.jpg,"stop" on a sign'),
        r"line 2, is not CSV: .*twice",
    ),
    "a row in the middle": ("c__csv", csv_rows("image,caption") + '6.jpg,"a\n', r"c\.csv, line 8, is not CSV"),
    "two images in a row": (
        "c__csv",
        csv_rows("image,file_name,text", "{}.jpg,1.jpg,a"),
        r"line 2, names different images",
    ),
    "two images in columns of one name": (
        "c__csv",
        csv_rows("image,caption,image", "{}.jpg,a,1.jpg"),
        r"line 2, names different images in image and image\.2; keep one of these columns",
    ),
    "rows beside an object of splits": (
        "c__json",
        json.dumps({"annotations": ROWS, "splits": {"train": ["0.jpg"], "test": ["5.jpg"]}}),
        r"c\.json holds rows in 'annotations' and 'splits'; write one list, with a split in each row",
    ),
    "a line break at the end of a quoted cell, between bars": (
        "c__csv",
        csv_rows("image|caption", '{}.jpg|"a red ball\n"'),
        r"c\.csv, line 3, has too few columns, or a quotation mark that is not closed in the line",
    ),
    "a bar in a quoted cell of a short row": (
        "c__csv",
        csv_rows("image|caption|source", '{}.jpg|"red | blue"'),
        r"c\.csv, line 2, has too few columns, or a quotation mark",
    ),
    "a bar and quotation marks in a quoted cell of a short row": (
        "c__csv",
        csv_rows("image|caption|source", '{}.jpg|"a ""red"" | blue"'),
        r"c\.csv, line 2, has too few columns, or a quotation mark",
    ),
    "a line break at the start of a quoted cell, between bars": (
        "c__csv",
        csv_rows("caption|image", '"\r\na red ball"|{}.jpg'),
        r"c\.csv, line 2, has too few columns, or a quotation mark that is not closed in the line",
    ),
    "a line break in a quoted cell before another, between bars": (
        "c__csv",
        csv_rows("image|caption|number", '{}.jpg|"a red\nball"|0'),
        r"c\.csv, line 2, has too few columns, or a quotation mark that is not closed in the line",
    ),
    **{
        f"quotation marks after backslashes, {suffix}": (
            f"c__{suffix}",
            csv_rows(f"image{mark}caption", f'{{}}.jpg{mark}"a sign that says \\"stop\\""'),
            rf"c\.{suffix}, line 2, .*quotation mark",
        )
        for suffix, mark in (("tsv", "\t"), ("csv", "|"))
    },
    "lists of cells": (
        "c__json",
        json.dumps({"image_urls": ["http://x/0.jpg", "http://x/1.JPG?w=1"], "captions": ["a ball", "a dog"]}),
        r"c\.json holds no object for each row; in pandas, write it with orient='records'",
    ),
    "rows apart from the columns": (
        "c__json",
        json.dumps({"columns": ["image", "caption"], "index": [0], "data": [["0.jpg", "a ball"]]}),
        r"c\.json holds no object for each row; in pandas, write it with orient='records'",
    ),
    "no such image": ("c__csv", csv_rows("image,caption") + "7.jpg,a ball\n", r"line 8: 7\.jpg is not under"),
    "an image as a number": (
        "c__json",
        json.dumps([{"image": 3, "caption": "a"}]),
        r"c\.json, entry 1, must give the image's file name as text, each row in its own object",
    ),
    "a caption as a number": (
        "c__jsonl",
        lines([{"image": "0.jpg", "caption": 3}]),
        r"line 1, has a caption that is not text: 3; write",
    ),
    "an object of Python's in a cell": (
        "c__csv",
        csv_rows("image,sentences,caption", "{}.jpg,x,\"{{'tokens': ['a'], 'raw': 'A ball.'}}\""),
        r"line 2, has a caption that is not text: \{'tokens'",
    ),
    "a list of objects in a cell": (
        "c__csv",
        csv_rows("image,caption", "{}.jpg,\"[{{'raw': 'A ball.'}}]\""),
        r"line 2, has a caption that is not text: \[\{'raw'",
    ),
    "a list with a number in a cell": (
        "c__csv",
        csv_rows("image,caption", "{}.jpg,\"['a ball', 3]\""),
        r"line 2, has a caption that is not text: \['a ball', 3\]; write text or a list",
    ),
    "texts by language in a cell": (
        "c__csv",
        csv_rows("image,caption", '{}.jpg,"{{""en"": ""a ball""}}"'),
        r"line 2, has a caption that is not text: \{\"en\"",
    ),
    "a placeholder in a cell": (
        "c__csv",
        csv_rows("image,caption", "{}.jpg,{{{{}}}}"),
        r"line 2, has a caption that is not text: \{\{\}\}",
    ),
    "an image in a cell": (
        "c__csv",
        csv_rows("image,caption", "\"{{'bytes': b'\\xff\\xd8', 'path': '{}.jpg'}}\",a ball"),
        r"line 2, has an image that is not a file name: \{'bytes': .*; save the images as files",
    ),
    "a long line that is no header": ("c__csv", "[" + "a" * 200_000 + "]", r"c\.csv, line 1, should name .* '\[aaa"),
    "no caption": ("c__jsonl", lines([{"image": "0.jpg"}]), r"line 1, has no caption \(a column called caption"),
    "no image": ("c__jsonl", lines([{"caption": "a ball"}]), r"line 1, has no image \(a column called photo"),
    "half a character": (
        "c__jsonl",
        '{"image": "0.jpg", "caption": "a \\ud83d ball"}',
        r"line 1, has .* half of a surrogate",
    ),
    "a caption that training refuses": (
        "c__csv",
        csv_rows("image,caption", "{}.jpg," + "a" * (MAX_CAPTION + 1)),
        r"line 2, has a caption of more than 5,000 characters",
    ),
    "a caption of two lines between pipes": (
        "c__csv",
        csv_rows("image|caption", '{}.jpg|"a red\nball"'),
        r"line 3, has 1 of the header's 2 columns; write the others, too, in one line",
    ),
    "Karpathy's": ("c__json", json.dumps({"images": [{"sentences": []}]}), r"annotation file of COCO or Karpathy"),
    "COCO's own": ("c__json", json.dumps({"images": [], "annotations": []}), r"annotation file of COCO"),
    "a name twice in an object": ("c__json", '{"0.jpg": "a", "0.jpg": "b"}', r"c\.json .*'0\.jpg' occurs twice"),
    "a name twice in a line": (
        "c__jsonl",
        '{"image": "0.jpg", "text": "a", "text": "b"}',
        r"line 1, .*'text' occurs twice",
    ),
    "not JSON": ("c__json", '[{"image": "0.jpg",\n"caption": }]', r"c\.json, line 2, is not JSON"),
    "a workbook": ("c__csv", b"PK\3\4" + bytes(99), r"c\.csv is a zip archive or an Excel workbook, not a text file"),
    "an empty file": ("c__csv", "", r"c\.csv, line 1, should name"),
    "UTF-16 without a mark": ("c__csv", csv_rows("image,caption").encode("utf-16-le"), r"c\.csv holds zero bytes"),
    "a name outside": ("c__csv", csv_rows("image,caption", "../{}.jpg,a"), r"line 2: \.\./0\.jpg is not under"),
    "a name too long": ("c__csv", csv_rows("image,caption", "a" * 9999 + "{}.jpg,a"), r"line 2: a{200} is not under"),
}


@pytest.mark.parametrize(("name", "content", "message"), REFUSED.values(), ids=REFUSED)
def test_tables_that_cannot_be_used_are_refused_with_file_and_entry(tmp_path, name, content, message):
    with pytest.raises(InputError, match=message) as caught:
        importers.import_folder(six(tmp_path / "in", **{name: content}), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "empty", ["", " ", "nan", "NaN", "None", "null", "...", "\U0001f600", "#NV", "#NAME?", "#DIV/0!", "42", "0 0.5 0.1"]
)
def test_empty_captions_are_left_out_and_counted(tmp_path, capsys, empty):
    table = csv_rows("image,caption") + f"3.jpg,{empty}\n4.jpg,{empty}\n"
    importers.import_folder(six(tmp_path / "in", c__csv=table), tmp_path / "out")
    assert all_captions(tmp_path / "out") == {f"{i}.jpg": ONE for i in range(6)}
    assert capsys.readouterr().err == f"left out 2 empty captions, the first is {tmp_path}/in/c.csv, line 8\n"


@pytest.mark.parametrize("nothing", ['""', "null", "NaN", "[]", '[""]'])
def test_an_image_whose_captions_are_empty_is_left_out_and_named(tmp_path, capsys, nothing):
    rows = lines(ROWS[:5]) + f'{{"photo": "5.jpg", "caption": {nothing}}}\n'
    importers.import_folder(six(tmp_path / "in", c__jsonl=rows), tmp_path / "out")
    assert set(all_captions(tmp_path / "out")) == {f"{i}.jpg" for i in range(5)}
    error = capsys.readouterr().err
    assert f"left out 1 empty caption: {tmp_path}/in/c.jsonl, line 6\n" in error
    assert f"left out 1 image without a caption: {tmp_path}/in/5.jpg\n" in error


@pytest.mark.parametrize("cell", ["['a red ball', None]", "['a red ball' nan]", '[""a red ball"", null]'])
def test_an_empty_caption_of_a_list_in_a_cell_is_counted(tmp_path, capsys, cell):
    importers.import_folder(
        six(tmp_path / "in", c__csv=csv_rows("image,caption", f'{{}}.jpg,"{cell}"')), tmp_path / "out"
    )
    assert all_captions(tmp_path / "out") == {f"{i}.jpg": ONE for i in range(6)}
    assert "left out 6 empty captions" in capsys.readouterr().err


MARKED = [
    "<start> a red ball <end>",
    "startseq a red ball endseq",
    "<s>a red ball</s>",
    "a red ball <end> <pad> <pad> .",
]
MARKED += ["[CLS] a red ball [SEP]", "a red ball<|endoftext|>", "a red <unk>"]


@pytest.mark.parametrize("marked", MARKED)
def test_captions_with_marks_of_start_and_end_are_told(tmp_path, capsys, marked):
    importers.import_folder(
        six(tmp_path / "in", c__csv=csv_rows("image,caption", f"{{}}.jpg,{marked}")), tmp_path / "a"
    )
    told = "read 6 captions with marks such as <start>, which are learned as words, the first is"
    assert capsys.readouterr().err == f"{told} {tmp_path}/in/c.csv, line 2\n"


def test_a_caption_that_starts_and_ends_with_these_words_has_no_marks(tmp_path, capsys):
    table = csv_rows("image,caption", "{}.jpg,start of a race seen from the end")
    importers.import_folder(six(tmp_path / "in", c__csv=table), tmp_path / "out")
    assert capsys.readouterr().err == ""


def test_columns_called_like_captions_that_are_not_used_are_reported(tmp_path, capsys):
    table = csv_rows("image,text,caption_a,caption_b", "{}.jpg,a red ball,ein roter Ball,")
    importers.import_folder(six(tmp_path / "in", c__csv=table), tmp_path / "out")
    assert all_captions(tmp_path / "out") == {f"{i}.jpg": ONE for i in range(6)}
    expected = f"left out 6 texts in the column 'caption_a', the first is {tmp_path}/in/c.csv, line 2\n"
    assert capsys.readouterr().err == expected
    table = csv_rows("image,en_caption,comment", "{}.jpg,a red ball,checked by Anna")
    importers.import_folder(six(tmp_path / "in", c__csv=table), tmp_path / "second")
    assert "left out 6 texts in the column 'en_caption', the first is" in capsys.readouterr().err
    table = csv_rows("image,description,text", "{}.jpg,a red ball,on sale now")
    importers.import_folder(six(tmp_path / "in", c__csv=table), tmp_path / "third")
    assert "left out 6 texts in the column 'description', the first is" in capsys.readouterr().err


@pytest.mark.parametrize("separator", [",", ";", "|", "\t"])
def test_a_caption_with_the_separator_is_not_cut_where_the_cells_after_it_are_blank(tmp_path, separator):
    table = csv_rows("image,caption,notes,by", "{}.jpg,a red ball,,").replace("a red ball,,", "a dog, brown,,", 1)
    source = six(tmp_path / "in", c__csv=table.replace(",", separator))
    with pytest.raises(InputError, match="line 2, has more columns than the header's 4; put a caption"):
        importers.import_folder(source, tmp_path / "out")
    for number, (header, row) in enumerate(
        [
            ("image,caption,notes", "{}.jpg,a red ball,,"),  # separators at the ends of lines
            ("image,caption,split", "{}.jpg,a red ball,train,"),
            ("caption,image", "a red ball,{}.jpg,,"),
        ]
    ):
        (source / "c.csv").write_text(csv_rows(header, row).replace(",", separator))
        importers.import_folder(source, tmp_path / f"{number}")
        assert all_captions(tmp_path / f"{number}") == {f"{i}.jpg": ONE for i in range(6)}


def test_a_column_filepath_that_tells_images_apart_is_refused_and_else_told(tmp_path, capsys):
    source = six(tmp_path / "in", c__csv=csv_rows("filepath,filename,caption", "a,{}.jpg,a red ball"))
    importers.import_folder(source, tmp_path / "out")
    assert "ignored 6 filepaths; write folder and name in one column called image, the first" in capsys.readouterr().err
    with open(source / "c.csv", "a") as file:
        file.write("b,0.jpg,a blue ball\n")
    with pytest.raises(
        InputError, match=r"line 8: 0\.jpg has the filepath a and the filepath b; write folder and name in one column"
    ):
        importers.import_folder(source, tmp_path / "second")
    for path in ("in", "in/{0}.jpg", "{0}_1.wav", ""):
        (source / "c.csv").write_text(csv_rows("filepath,filename,caption", f"{path},in/{{0}}.jpg,a red ball"))
        importers.import_folder(source, tmp_path / f"out{path[:2]}{len(path)}".replace("/", ""))
        assert "filepath" not in capsys.readouterr().err


@pytest.mark.parametrize("column", ["class", "Folder"])
def test_a_column_of_folders_that_tells_images_apart_is_refused(tmp_path, column):
    rows = csv_rows(f"{column},image,caption", "a,{}.jpg,a red ball")
    source = six(tmp_path / "in", c__csv=f"{rows}b,0.jpg,a blue ball\n")
    (source / "a").mkdir()
    (source / "0.jpg").rename(source / "a" / "0.jpg")
    with pytest.raises(
        InputError, match=rf"line 8: 0\.jpg has the {column.lower()} a and the {column.lower()} b; write"
    ):
        importers.import_folder(source, tmp_path / "out")


@pytest.mark.parametrize("text", ["ein roter Ball", "红色的球"])
def test_captions_in_a_further_column_are_counted_in_any_script(tmp_path, capsys, text):
    source = six(tmp_path / "in", c__csv=csv_rows("image,caption,caption_2nd", f"{{}}.jpg,a red ball,{text}"))
    importers.import_folder(source, tmp_path / "out")
    assert "left out 6 texts in the column 'caption_2nd'" in capsys.readouterr().err


@pytest.mark.parametrize("mark", ["||", "|||", "###"])
def test_marks_between_captions_of_one_cell_are_reported(tmp_path, capsys, mark):
    source = six(tmp_path / "in", c__csv=csv_rows("image,caption", f"{{}}.jpg,a red ball {mark} one ball"))
    importers.import_folder(source, tmp_path / "out")
    assert "read 6 captions with marks such as <start>, which are learned as words" in capsys.readouterr().err


@pytest.mark.parametrize("columns", ["data_split", "original_split,karpathy_split"])
def test_a_column_of_splits_that_is_not_used_is_told(tmp_path, capsys, columns):
    names = columns.split(",")
    table = csv_rows(f"image,caption,{columns}", "{}.jpg,a red ball" + ",train" * len(names))
    importers.import_folder(
        six(tmp_path / "in", c__csv=table.replace("5.jpg,a red ball,train", "5.jpg,a red ball,")), tmp_path / "out"
    )
    assert f"ignored {len(names)} column" in capsys.readouterr().err


@pytest.mark.parametrize("column", ["is_train", "test"])
def test_a_column_of_splits_in_zeros_and_ones_is_told(tmp_path, capsys, column):
    table = csv_rows(f"image,caption,{column}", "{}.jpg,a red ball,1").replace(
        "5.jpg,a red ball,1", "5.jpg,a red ball,0"
    )
    importers.import_folder(six(tmp_path / "in", c__csv=table), tmp_path / "out")
    assert f"ignored 1 column of splits; only one called split is used: {tmp_path}/in/c.csv, {column}" in (
        capsys.readouterr().err
    )


def test_captions_of_one_word_each_are_told(tmp_path, capsys):
    rows = [{**row, "caption": ["a", "red", "ball"]} for row in json_rows(image="{}.jpg")]
    importers.import_folder(six(tmp_path / "in", c__jsonl=lines(rows)), tmp_path / "out")
    assert "read 6 rows with captions of one word each; join words that are one caption" in capsys.readouterr().err


def test_two_columns_may_name_an_image_with_and_without_its_folder(tmp_path):
    for number, path in enumerate(["in\\{0}.jpg", "/content/drive/{0}.jpg", "https://a.org/{0}.jpg"]):
        table = csv_rows("image_name,image_path,caption", f"{{0}},{path},a red ball")
        importers.import_folder(six(tmp_path / "in", c__csv=table), tmp_path / f"{number}")
        assert all_captions(tmp_path / f"{number}") == {f"{i}.jpg": ONE for i in range(6)}


def test_a_table_of_images_without_captions_is_told(tmp_path, capsys):
    source = six(tmp_path / "in", train__csv=csv_rows("image,caption"), test__csv="image\n0.jpg\n")
    importers.import_folder(source, tmp_path / "out")
    assert f"in which no row with an image and a caption can be read: {source}/test.csv" in capsys.readouterr().err
    text(source / "val.csv", "image,captoin\n0.jpg,a red ball\n")
    with pytest.raises(InputError, match=r"val\.csv, line 1, should name a column"):
        importers.import_folder(source, tmp_path / "second")


@pytest.mark.parametrize(
    ("encoding", "content", "message"),
    [
        (
            "cp1252",
            "0.jpg,caf\xe9\n".encode() + b"1.jpg,caf\xe9\n",
            "line 2, is UTF-8, but others are not; save the whole",
        ),
        ("latin-1", b"0.jpg,the dog\x92s ball\n", "line 2, holds the control character .* in latin-1; try cp1252"),
    ],
)
def test_an_encoding_that_is_not_that_of_all_lines_is_refused(tmp_path, encoding, content, message):
    source = six(tmp_path / "in", c__csv=b"image,caption\n" + content)
    with pytest.raises(InputError, match=message):
        importers.import_folder(source, tmp_path / "out", encoding=encoding)


@pytest.mark.parametrize("caption", ["CAFÉ’S", "NESTLÉ®"])
def test_text_may_be_utf_8_by_chance(tmp_path, caption):
    rows = "".join(f"{i}.jpg,{caption if i else 'a café'}\n" for i in range(6))
    source = six(tmp_path / "in", c__csv=f"image,caption\n{rows}".encode("cp1252"))
    importers.import_folder(source, tmp_path / "out", encoding="cp1252")
    assert all_captions(tmp_path / "out")["1.jpg"] == [caption]


def test_images_has_to_be_a_folder(tmp_path):
    source = six(tmp_path / "in", c__csv=csv_rows("image,caption"), photos__zip=b"PK")
    with pytest.raises(InputError, match=r"photos\.zip is a file; unpack it if it is an archive, and name the folder"):
        importers.import_folder(source, tmp_path / "out", images=source / "photos.zip")


def test_the_suffix_of_files_that_are_no_images_is_said(tmp_path):
    for i in range(3):
        text(tmp_path / "in" / f"{i}.jpg_large", "")
    with pytest.raises(
        InputError, match=r"no images, but 3 of \.jpg_large, which is not the suffix of an image; rename"
    ):
        importers.import_folder(tmp_path / "in", tmp_path / "out")


def test_rows_with_an_error_in_place_of_a_caption_are_left_out_and_counted(tmp_path, capsys):
    """As caption.py --output writes them for images that it cannot read, which may be missing."""
    errors = [{"photo": "0.jpg", "error": "0.jpg is empty"}, {"photo": "gone.jpg", "error": "gone.jpg does not exist"}]
    importers.import_folder(six(tmp_path / "in", c__jsonl=lines([*errors, *ROWS[1:]])), tmp_path / "out")
    assert all_captions(tmp_path / "out") == {f"{i}.jpg": ONE for i in range(1, 6)}
    assert (
        f"left out 2 rows with an error in place of a caption, the first is {tmp_path}/in/c.jsonl, line 1\n"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("inside", ["", "images/", "data/images/"])
def test_folders_called_like_splits_give_them_at_any_level(tmp_path, inside):
    names = [f"{inside}{split}/{i}.jpg" for split in ("train", "val", "test") for i in range(3)]
    for i, name in enumerate(names):
        make_image(tmp_path / "in" / name, (8 + i, 6))
    (tmp_path / "in" / "c.csv").write_text("image,caption\n" + "".join(f"{name},a ball\n" for name in names))
    importers.import_folder(tmp_path / "in", tmp_path / "out")
    for split in ("train", "val", "test"):
        assert set(captions(tmp_path / "out", split)) == {name for name in names if f"{split}/" in name}


def test_a_column_set_gives_splits_if_it_names_them(tmp_path):
    rows = "".join(f"{i}.jpg,a ball,{('train', 'train', 'train', 'val', 'test', 'test')[i]}\n" for i in range(6))
    importers.import_folder(six(tmp_path / "in", c__csv="image,caption,set\n" + rows), tmp_path / "out")
    assert set(captions(tmp_path / "out", "test")) == {"4.jpg", "5.jpg"}
    source = six(tmp_path / "in", c__csv="image,caption,set\n" + rows.replace("val", "held out"))
    with pytest.raises(InputError, match=r"line 5: the split 'held out' is not one of train, val and test"):
        importers.import_folder(source, tmp_path / "other")
    other = re.sub("train|val|test", "A", rows)
    importers.import_folder(six(tmp_path / "in", c__csv="image,caption,set\n" + other), tmp_path / "other")
    assert len(captions(tmp_path / "other", "train")) == 4
    years = rows.replace("train", "train2017").replace("val", "val_images")
    importers.import_folder(six(tmp_path / "in", c__csv="image,caption,subset\n" + years), tmp_path / "years")
    assert set(captions(tmp_path / "years", "val")) == {"3.jpg"}


def test_another_column_gives_splits_if_all_its_rows_name_them(tmp_path, capsys):
    splits = ("train", "train", "Training", "val", "test", "test")
    table = "image,caption,usage,kind\n" + "".join(f"{i}.jpg,a ball,{split},test\n" for i, split in enumerate(splits))
    importers.import_folder(six(tmp_path / "in", c__csv=table + ",,,\n"), tmp_path / "out")
    assert set(captions(tmp_path / "out", "test")) == {"4.jpg", "5.jpg"}
    assert capsys.readouterr().err == f"read 1 column as the split of its rows: {tmp_path}/in/c.csv, usage\n"
    for number, other in enumerate((table.replace("Training", "Public"), table.replace(",test\n", ",val\n", 1))):
        importers.import_folder(six(tmp_path / "in", c__csv=other), tmp_path / f"out{number}")
        assert len(captions(tmp_path / f"out{number}", "train")) == 4
        ignored = "ignored 1 column" if number == 0 else "ignored 2 columns"
        assert capsys.readouterr().err.startswith(f"{ignored} of splits; only one called split is used")


@pytest.mark.parametrize(
    "value",
    [
        *("[array(['a ball'], dtype='<U10')]", "[list(['a', 'b'])]", "[['it's a', 'b']]", "[None, 'it's one']"),
        *(
            "('a ball', 'it's one')",
            "['the dog''s ball', 'one']",
            "[nan, 'a dog']",
            "(np.str_('a dog'), np.str_('b'))",
            "{'en': 'it's one'}",
            "0    a ball\n1    it's one\nName: caption, dtype: object",
        ),
    ],
)
def test_what_is_a_list_and_no_caption(value):
    with pytest.raises(
        InputError, match=r"(?s)^0\.txt, has a caption that is not text: .*; write text or a list of texts"
    ):
        clean_caption(value, "0.txt")


@pytest.mark.parametrize(
    "value", ["[a red ball]", "[not None]", '("Stop" is on the sign)', "(a dog, a cat)", "a {ball}"]
)
def test_a_caption_in_brackets_is_a_caption(value):
    assert clean_caption(value, "0.txt") == value


def test_rows_beside_lists_of_splits_are_refused(tmp_path):
    rows = {"data": ROWS, "train": ["0.jpg"], "test": ["5.jpg"]}
    with pytest.raises(InputError, match="holds rows in 'data' and 'train'; write one list, with a split in each row"):
        importers.import_folder(six(tmp_path / "in", c__json=json.dumps(rows)), tmp_path / "out")
    counted = {"train": [{**row, "set": "A", "split": None} for row in ROWS], "val": 500}
    importers.import_folder(six(tmp_path / "in", c__json=json.dumps(counted)), tmp_path / "out")
    assert not (tmp_path / "out" / "annotations" / "captions_test.json").exists()


def test_the_name_of_the_only_list_may_be_a_split(tmp_path):
    rows = {"train": ROWS, "test": [], "info": "drawn"}
    importers.import_folder(six(tmp_path / "in", c__json=json.dumps(rows)), tmp_path / "out")
    assert len(captions(tmp_path / "out", "train")) == 5
    assert len(captions(tmp_path / "out", "val")) == 1
    assert not (tmp_path / "out" / "annotations" / "captions_test.json").exists()


def test_a_table_named_after_a_split_gives_it(tmp_path, capsys):
    rows = csv_rows("image,caption").splitlines(True)
    parts = {"train": rows[1:4], "val": rows[4:5], "test": rows[5:]}
    source = six(tmp_path / "in", **{f"my_{split}__csv": rows[0] + "".join(part) for split, part in parts.items()})
    importers.import_folder(source, tmp_path / "out")
    assert set(captions(tmp_path / "out", "val")) == {"3.jpg"}
    assert set(captions(tmp_path / "out", "test")) == {"4.jpg", "5.jpg"}
    assert f"read 1 table as the test split, after its name: {source}/my_test.csv\n" in capsys.readouterr().err
    importers.import_folder(source / "my_test.csv", tmp_path / "test")
    assert set(all_captions(tmp_path / "test")) == set(captions(tmp_path / "test", "test")) == {"4.jpg", "5.jpg"}
    importers.import_folder(source / "my_train.csv", tmp_path / "train")
    assert [len(captions(tmp_path / "train", split)) for split in ("train", "val")] == [2, 1]
    (source / "my_test.csv").rename(source / "validation.csv")
    with pytest.raises(InputError, match=r"my_train\.csv and .*my_val\.csv may both hold the captions"):
        importers.import_folder(source, tmp_path / "both")


def test_json_tables_named_after_splits(tmp_path):
    parts = {"train": ROWS[:4], "val": ROWS[4:5], "test": ROWS[5:]}
    tables = {f"coco_karpathy_{split}__json": json.dumps(rows) for split, rows in parts.items()}
    importers.import_folder(six(tmp_path / "in", **tables), tmp_path / "out")
    assert set(captions(tmp_path / "out", "test")) == {"5.jpg"}


@pytest.mark.parametrize(
    "table",
    [("captions__json", json.dumps({f"{i}.jpg": "a red ball" for i in range(6)})), ("c__csv", FORMS["filename"][1])],
)
def test_a_table_is_used_before_files_next_to_the_images_and_before_other_tables(tmp_path, capsys, table):
    others = {
        "00000_stats__json": '{"count": 6, "status_dict": {"success": 6}}',
        "labels__json": '{"0.jpg": 3}',
        "id2label__json": '{"0": "ball"}',
        "broken__json": "{",
        "urls__csv": "url,width\nx,3\n",
    }
    source = six(tmp_path / "in", **others, **{f"{i}__txt": f"ball {i}" for i in range(6)})
    importers.import_folder(source, tmp_path / "out")
    assert all_captions(tmp_path / "out") == {f"{i}.jpg": [f"ball {i}"] for i in range(6)}
    unrelated = "left out 1 table in which no row with an image and a caption can be read"
    assert capsys.readouterr().err == f"{unrelated}: {source}/urls.csv\n"
    importers.import_folder(six(source, **dict([table])), tmp_path / "table")
    assert all_captions(tmp_path / "table")["0.jpg"] in (ONE, TWO)
    error = capsys.readouterr().err
    assert error.startswith(f"{unrelated}: {source}/urls.csv\nleft out 6 .txt files next to an image, as a table holds")
    assert error.count("\n") == 2


def test_an_unrelated_metadata_file_is_left_out(tmp_path, capsys):
    source = six(tmp_path / "in", metadata__csv="id,license\n0,MIT\n", captions__csv=csv_rows("image,caption"))
    importers.import_folder(source, tmp_path / "out")
    assert all_captions(tmp_path / "out") == {f"{i}.jpg": ONE for i in range(6)}
    assert "left out 1 table in which no row with an image and a caption can be read" in capsys.readouterr().err
    (source / "captions.csv").unlink()
    with pytest.raises(InputError, match=r"metadata\.csv, line 1, should name a column"):
        importers.import_folder(source, tmp_path / "out2")


@pytest.mark.parametrize(
    ("name", "content", "advice"),
    [
        ("captions.txt", csv_rows("image,caption"), r"; name .*/captions\.txt itself if it holds the captions"),
        ("train/c.csv", csv_rows("image,caption"), r"; name .*/train/c\.csv itself if it holds the captions"),
        ("captions.xlsx", "PK", r"; save .*/captions\.xlsx as CSV"),
        ("train/metadata.parquet", "PAR1", r"; save .*/train/metadata\.parquet as CSV"),
        (
            "captions/train/0.txt",
            "a ball",
            r"; for captions such as .*/0\.txt, name .*/captions with --images .*/images",
        ),
        ("labels/train/0.txt", "0 0.5", ""),
        ("images/train/0.json", '{"text": "a red ball"}', ""),
        (
            "images/train/0.json",
            '{"caption": "a red ball", "is_rejected": true}',
            r"; left out 1 rejected caption: .*/0\.json",
        ),
        (
            "annotations/captions_train.json",
            "{}",
            r"; .*/captions_train\.json is in COCO's layout, which `python train\.py --data .*/in` takes as it is",
        ),
        ("annotations/captions_all.json", "{}", ""),
    ],
)
def test_where_else_captions_may_be_is_said(tmp_path, name, content, advice):
    source = six(tmp_path / "in" / "images" / "train").parents[1]
    (source / name).parent.mkdir(parents=True, exist_ok=True)
    (source / name).write_text(content)
    with pytest.raises(InputError, match=rf'holds no table of captions .* "captions"{advice}\.$'):
        importers.import_folder(source, tmp_path / "out")


REJECTED = {"is_rejected": True}, {"is_precanned": 1}, {"is_precanned": "True", "is_rejected": False}


@pytest.mark.parametrize("mark", REJECTED, ids=str)
@pytest.mark.parametrize("name", ["c.csv", "c.json", "sidecars"])
def test_rejected_captions_are_left_out_and_counted(tmp_path, capsys, name, mark):
    """VizWiz marks captions of images that show nothing."""
    source = six(tmp_path / "in")
    spam = {"caption": "Quality issues are too severe to recognize visual content.", **mark}
    if name == "sidecars":
        for i in range(6):
            (source / f"{i}.json").write_text(json.dumps(spam if i == 5 else {"caption": "a red ball"}))
    elif name == "c.json":
        (source / name).write_text(json.dumps([*ROWS, {"image": "5.jpg", **spam}]))
    else:
        rows = csv_rows(f"image,caption,{','.join(mark)}", "{}.jpg,a red ball," + ",".join("0" * len(mark)))
        (source / name).write_text(f"{rows}5.jpg,{spam['caption']},{','.join(map(str, mark.values()))}\n")
    importers.import_folder(source, tmp_path / "out")
    found = all_captions(tmp_path / "out")
    assert found == {f"{i}.jpg": ONE for i in range(5 if name == "sidecars" else 6)}
    assert "left out 1 rejected caption: " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["splits.json", "train.lst", "splits/train.txt", "train.json", "splits.csv"])
def test_lists_of_splits_in_other_forms_are_reported(tmp_path, capsys, name):
    source = six(tmp_path / "in", c__csv=csv_rows("image,caption"))
    text(source / name, json.dumps({"train": ["0.jpg"]} if "splits" in name else ["0.jpg"]))
    importers.import_folder(source, tmp_path / "out")
    error = capsys.readouterr().err
    assert "list of a split" in error or "no row with an image and a caption" in error
    assert error.count(str(source / name)) == 1
    for other in ("code/requirements-dev.txt", "annotations/captions_val2017.json"):
        text(source / other, "[]")
    importers.import_folder(source, tmp_path / "second")
    assert capsys.readouterr().err == error


@pytest.mark.parametrize("form", ["sidecars", "a table in the folder", "a table that is named"])
def test_lists_of_splits_that_are_not_read_are_reported(tmp_path, capsys, form):
    source = six(tmp_path / "in", train__txt="0.jpg\n1.jpg\n2.jpg\n3.jpg\n", val__txt="4.jpg\n", test__txt="5.jpg\n")
    if form == "sidecars":
        six(source, **{f"{i}__txt": "a red ball" for i in range(6)})
    else:
        six(source, c__csv=csv_rows("image,caption"))
    importers.import_folder(source / "c.csv" if form.endswith("named") else source, tmp_path / "out")
    error = capsys.readouterr().err
    assert "left out 3 lists of a split; a table gives splits in a column called split, the first is" in error
    assert "without an image" not in error


def test_a_text_without_an_image_is_no_list_because_its_name_ends_like_one(tmp_path, capsys):
    source = six(tmp_path / "in", **{f"{i}__txt": "a red ball" for i in range(6)})
    (source / "more").mkdir()
    (source / "more" / "beach_test.txt").write_text("a beach")
    (source / "walk_val.caption").write_text("a walk")
    importers.import_folder(source, tmp_path / "out")
    error = capsys.readouterr().err
    assert f"left out 1 .txt file without an image: {source}/more/beach_test.txt\n" in error
    assert f"left out 1 .caption file without an image: {source}/walk_val.caption\n" in error


def test_the_text_of_an_image_beside_a_named_table_is_no_list(tmp_path, capsys):
    source = six(tmp_path / "in", c__csv=csv_rows("image,caption"))
    (source / "5.jpg").rename(source / "a_test.jpg")
    (source / "a_test.txt").write_text("a red ball")
    (source / "c.csv").write_text((source / "c.csv").read_text().replace("5.jpg", "a_test.jpg"))
    importers.import_folder(source / "c.csv", tmp_path / "out")
    assert capsys.readouterr().err == ""


def test_the_text_beside_a_rejected_caption_is_left_out_too(tmp_path, capsys):
    """img2dataset writes both files."""
    source = six(tmp_path / "in", **{f"{i}__txt": "a red ball" for i in range(6)})
    (source / "5.json").write_text('{"caption": "a red ball", "is_rejected": true}')
    importers.import_folder(source, tmp_path / "out")
    assert all_captions(tmp_path / "out") == {f"{i}.jpg": ONE for i in range(5)}
    assert f"left out 1 rejected caption: {source}/5.json\n" in capsys.readouterr().err


def test_lists_of_images_beside_rows_are_no_columns(tmp_path):
    rows = [{"image": f"{i}.jpg", "caption": "a red ball"} for i in range(6)]
    document = {"images": [f"{i}.jpg" for i in range(6)], "captions": rows}
    importers.import_folder(six(tmp_path / "in", c__json=json.dumps(document)), tmp_path / "out")
    assert all_captions(tmp_path / "out") == {f"{i}.jpg": ONE for i in range(6)}


@pytest.mark.parametrize(
    "content", ["image,caption\n", "texture_0.jpg\n", "image,context\n0.jpg,a\n", "image,caption\n0.jpg,\n"]
)
def test_a_list_of_a_split_is_no_table_of_captions(tmp_path, capsys, content):
    source = six(tmp_path / "in", captions__csv=csv_rows("image,caption"), test__csv=content)
    importers.import_folder(source, tmp_path / "out")
    assert all_captions(tmp_path / "out") == {f"{i}.jpg": ONE for i in range(6)}
    assert f"caption can be read: {source}/test.csv" in capsys.readouterr().err


def test_a_table_of_a_split_that_cannot_be_read_is_no_list(tmp_path):
    source = six(
        tmp_path / "in", captions__csv=csv_rows("image,caption"), val__csv='image,caption\n3.jpg,"a "red" dog"\n'
    )
    with pytest.raises(InputError, match=r"captions\.csv and .*val\.csv may both hold the captions"):
        importers.import_folder(source, tmp_path / "out")


@pytest.mark.parametrize("stems", [("text_1", "logo_1"), ("caption", "bus")])
def test_images_called_like_columns_are_images(tmp_path, stems):
    names = [*stems, "tree", "park", "rain", "road"]
    source = six(tmp_path / "in", c__json=json.dumps({name: ["a red ball"] for name in names}))
    for i, name in enumerate(names):
        (source / f"{i}.jpg").rename(source / f"{name}.jpg")
    importers.import_folder(source, tmp_path / "out")
    assert all_captions(tmp_path / "out") == {f"{name}.jpg": ONE for name in names}


def test_a_list_of_a_split_beside_a_table_holds_no_captions(tmp_path, capsys):
    source = six(tmp_path / "in", c__csv=csv_rows("image,caption"), test_ids__csv="image\n0.jpg\n")
    importers.import_folder(source, tmp_path / "out")
    assert all_captions(tmp_path / "out") == {f"{i}.jpg": ONE for i in range(6)}
    unread = "left out 1 table in which no row with an image and a caption can be read"
    assert f"{unread}: {source}/test_ids.csv\n" in capsys.readouterr().err


def test_an_object_of_stems_may_hold_an_image_without_captions(tmp_path, capsys):
    rows = {str(i): [{"caption": "a red ball"}] if i else [] for i in range(6)}
    importers.import_folder(six(tmp_path / "in", c__json=json.dumps(rows)), tmp_path / "out")
    assert all_captions(tmp_path / "out") == {f"{i}.jpg": ONE for i in range(1, 6)}
    assert "left out 1 empty caption" in capsys.readouterr().err


def test_captions_in_two_places_are_refused(tmp_path):
    source = six(tmp_path / "in", c__csv=csv_rows("image,caption"))
    make_image(source / "more" / "9.jpg")
    (source / "more" / "metadata.csv").write_text("file_name,text\n9.jpg,a ball\n")
    with pytest.raises(InputError, match=r"metadata\.csv and .*c\.csv may both hold the captions"):
        importers.import_folder(source, tmp_path / "out")


def test_text_files_in_upper_case_are_captions(tmp_path, capsys):
    importers.import_folder(six(tmp_path / "in", **{f"{i}__TXT": "a red ball" for i in range(5)}), tmp_path / "out")
    assert len(all_captions(tmp_path / "out")) == 5
    assert "left out 1 image without a caption in a .txt, .caption or .json file: " in capsys.readouterr().err


def test_names_may_repeat_the_path_of_the_images_folder(tmp_path, monkeypatch):
    images = six(tmp_path / "in" / "pictures")
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(["pictures", "in/pictures", r".\in\pictures", str(images)]):
        (tmp_path / "c.csv").write_text(csv_rows("image,caption", f"{name}/{{}}.jpg,a red ball"))
        for kind, convert in (("folder", importers.import_folder), ("flickr", importers.import_flickr)):
            convert(tmp_path / "c.csv", tmp_path / f"{kind}{number}", images=Path("in/pictures"))
            assert all_captions(tmp_path / f"{kind}{number}") == {f"{i}.jpg": ONE for i in range(6)}


def test_a_name_that_exists_as_it_is_is_taken_so(tmp_path):
    six(tmp_path / "in" / "images")
    images = six(tmp_path / "in" / "images" / "images").parent
    (tmp_path / "in" / "c.csv").write_text(csv_rows("image,caption", "images/{}.jpg,a red ball"))
    importers.import_folder(tmp_path / "in" / "c.csv", tmp_path / "out", images=images)
    assert set(all_captions(tmp_path / "out")) == {f"images/{i}.jpg" for i in range(6)}


def test_a_table_that_is_called_like_a_text_file_has_rows(tmp_path, capsys):
    source = six(tmp_path / "in", c__txt="".join(csv_rows("image,caption").splitlines(True)[:-1]))
    importers.import_folder(source / "c.txt", tmp_path / "out")
    assert f"left out 1 image without a row: {source}/5.jpg" in capsys.readouterr().err


def test_captions_that_are_names_of_images_are_told(tmp_path, capsys):
    document = {f"{i}": [f"{i}.jpg", "a red ball"] for i in range(6)}
    importers.import_folder(six(tmp_path / "in", c__json=json.dumps(document)), tmp_path / "out")
    assert "read 6 captions that are names of images, the first is" in capsys.readouterr().err


def test_a_table_in_a_subfolder_is_told(tmp_path, capsys):
    source = six(tmp_path / "in", c__csv=csv_rows("image,caption"))
    text(source / "more" / "captions.csv", csv_rows("image,caption"))
    text(source / "more" / "prices.csv", "item,price\nball,3\n")
    importers.import_folder(source, tmp_path / "out")
    told = "left out 1 table in a subfolder, where only metadata.csv and metadata.jsonl are read"
    assert capsys.readouterr().err == f"{told}: {source}/more/captions.csv\n"


def test_a_json_table_of_few_images_is_read_where_nothing_else_holds_captions(tmp_path):
    rows = [{"image": f"{i}.jpg", "caption": "a red ball"} for i in range(3)]
    source = six(tmp_path / "in", captions__json=json.dumps(rows), urls__csv="url,width\na,3\n")
    for i in range(6, 20):
        make_image(source / f"{i}.jpg")
    importers.import_folder(source, tmp_path / "out")
    assert all_captions(tmp_path / "out") == {f"{i}.jpg": ONE for i in range(3)}


@pytest.mark.parametrize("order", ["le", "be"])
@pytest.mark.parametrize("caption", ["a red ball", "一只狗和一个人在一起\n", "一只狗，一个人　和"])
def test_utf_16_without_a_mark_is_read_in_either_byte_order_or_refused(tmp_path, order, caption):
    source = six(tmp_path / "in", **{f"{i}__txt": caption.encode(f"utf-16-{order}") for i in range(6)})
    if "　" in caption:
        with pytest.raises(InputError, match=r"0\.txt has no byte order mark; name its encoding as utf-16-le or"):
            importers.import_folder(source, tmp_path / "out", encoding="utf-16")
    for name in (f"utf-16-{order}", *(["UTF16"] if "　" not in caption else [])):
        importers.import_folder(source, tmp_path / name, encoding=name)
        assert all_captions(tmp_path / name) == {f"{i}.jpg": [" ".join(caption.split())] for i in range(6)}


def test_captions_that_two_metadata_files_repeat_are_counted(tmp_path, capsys):
    six(tmp_path / "in")
    (tmp_path / "in" / "train").mkdir()
    for number in range(6):
        (tmp_path / "in" / f"{number}.jpg").rename(tmp_path / "in" / "train" / f"{number}.jpg")
    rows = [{"file_name": f"{number}.jpg", "text": f"ball {number}"} for number in range(6)]
    (tmp_path / "in" / "train" / "metadata.jsonl").write_text(lines(rows))
    (tmp_path / "in" / "metadata.jsonl").write_text(
        lines([{**row, "file_name": f"train/{row['file_name']}"} for row in rows])
    )
    importers.import_folder(tmp_path / "in", tmp_path / "out")
    told = "read 6 rows with a caption that its image has already, the first is"
    assert f"{told} {tmp_path}/in/train/metadata.jsonl, line 1" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../{}.jpg", "..\\{}.jpg"])
@pytest.mark.parametrize("by_file", [False, True])
def test_names_relative_to_a_table_beside_the_images(tmp_path, name, by_file):
    folder = six(tmp_path / "in")
    (folder / "tables").mkdir()
    table = folder / "tables" / "captions.csv"
    table.write_text(csv_rows("image,caption", f"{name},a ball"))
    importers.import_folder(table if by_file else table.parent, tmp_path / "out", images=folder)
    assert len(captions(tmp_path / "out", "train")) == 4


SPLITS = {"train": ["0.jpg", "1.jpg", "2.jpg", "3.jpg"], "val": ["4.jpg"], "test": ["5.jpg"]}
LISTS = {
    "dataset_split.json": json.dumps(SPLITS),
    "splits/karpathy.json": json.dumps(SPLITS),
    "splits/val_list.txt": "4.jpg\n",
    "splits/captions_val.txt": "4.jpg\n5.jpg\n",
    "lists/val_ids.list": "4\n",
    "Flickr8k_text/Flickr_8k.devImages.txt": "4.jpg\n",
    "list_eval_partition.txt": "6\nimage_name evaluation_status\n0.jpg train\n",
    "splits/val_list.csv": "filename\n4.jpg\n",
}


@pytest.mark.parametrize("name", LISTS)
def test_lists_of_splits_are_reported_by_whatever_name(tmp_path, capsys, name):
    folder = six(tmp_path / "in", captions__csv=csv_rows("image,caption"))
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(LISTS[name])
    importers.import_folder(folder, tmp_path / "out")
    assert f"left out 1 list of a split; a table gives splits in a column called split: {folder / name}" in (
        capsys.readouterr().err
    )


def test_texts_that_list_no_images_are_not_lists_of_splits(tmp_path, capsys):
    folder = six(tmp_path / "in", captions__csv=csv_rows("image,caption"))
    (folder / "more").mkdir()
    for name, content in (
        ("requirements-dev.txt", "ruff\n"),
        ("beach_test.txt", "sand\n"),
        ("split_info.json", "{}"),
        ("captions_val.txt", "0.jpg\ta ball on grass\n"),
        ("how_we_split.txt", "1 We took photos.\n"),
    ):
        (folder / "more" / name).write_text(content)
    importers.import_folder(folder, tmp_path / "out")
    assert "list" not in capsys.readouterr().err


def test_other_columns_do_not_replace_a_missing_caption(tmp_path):
    rows = [{"image": f"{i}.jpg", "caption": "a ball"} for i in range(5)] + [{"image": "5.jpg", "comment": "too dark"}]
    folder = six(tmp_path / "in", c__jsonl=lines(rows))
    with pytest.raises(
        InputError, match=r"line 6, has a text in 'comment', and other rows have .* in 'caption'; use one"
    ):
        importers.import_folder(folder, tmp_path / "out")
    rejected = {"image": "5.jpg", "text": "a bad one", "is_rejected": True}
    (folder / "c.jsonl").write_text(lines([*rows[:5], rejected, {"image": "4.jpg", "text": "STOP", "error": "none"}]))
    importers.import_folder(folder, tmp_path / "rejected")
    (folder / "c.jsonl").write_text(lines([*rows[:5], {"image": "5.jpg"}]))
    with pytest.raises(InputError, match=r"c\.jsonl, line 6, has no caption"):
        importers.import_folder(folder, tmp_path / "out")


def test_captions_that_name_splits_are_no_column_of_splits(tmp_path, capsys):
    table = "image,caption\n" + "".join(f"{i}.jpg,{text}\n" for i, text in enumerate(("train", "test", *"abcd")))
    importers.import_folder(six(tmp_path / "in", c__csv=table), tmp_path / "out")
    assert "column" not in capsys.readouterr().err


TABLES = {
    "a table of names without suffixes": ("meta.json", '{"0": {"caption": "a ball on grass"}}'),
    "a table of other suffixes": ("captions.json", '[{"image": "0.png", "caption": "a red ball"}]'),
    "JSON with a comma too many": ("captions.json", '[{"image": "0.jpg", "caption": "a red ball"},]'),
    "a table in a subfolder": ("annotations/captions.json", '[{"image": "0.jpg", "caption": "a red ball"}]'),
}
TOLD = {
    "a table in a subfolder": "left out 1 table in a subfolder, where only metadata.csv and metadata.jsonl are read",
    "JSON with a comma too many": "left out 1 table that cannot be read",
}


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("beside", ["texts", "a table"])
def test_json_that_is_not_used_beside_other_captions_is_reported(tmp_path, capsys, kind, beside):
    name, content = TABLES[kind]
    folder = six(tmp_path / "in", **({"c__csv": csv_rows("image,caption")} if beside == "a table" else {}))
    if beside == "texts":
        for i in range(6):
            (folder / f"{i}.txt").write_text("ball, red")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(content)
    importers.import_folder(folder, tmp_path / "out")
    told = capsys.readouterr().err
    assert TOLD.get(kind, "left out 1 table beside other captions; name it if it holds the captions") in told
    assert str(folder / name) in told


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("usage", ("train", "train", "train", "train", "val", "test-dev")),
        ("partition", ("train", "train", "train", "train", "val", "")),
        ("partition", (0, 0, 0, 0, 1, 2)),
        ("phase", ("trn", "trn", "trn", "trn", "vld", "tst")),
        ("set", (0, 0, 0, 0, 1, 2)),
        ("kind", ("train", "val", "a", "b", "c", "d")),
    ],
)
def test_columns_that_seem_to_give_splits_are_reported(tmp_path, capsys, column, values):
    table = f"image,caption,{column}\n" + "".join(f"{i}.jpg,a ball,{value}\n" for i, value in enumerate(values))
    importers.import_folder(six(tmp_path / "in", c__csv=table), tmp_path / "out")
    told = f"ignored 1 column of splits; only one called split is used: {tmp_path}/in/c.csv, {column}\n"
    assert told in capsys.readouterr().err


def test_json_files_of_no_image_and_further_captions_of_one(tmp_path, capsys):
    folder = six(tmp_path / "in")
    for i in range(7):
        (folder / f"{i}.json").write_text(json.dumps({"caption": f"ball {i}", "caption_2": "one ball"}))
    (folder / "settings.json").write_text('{"size": 5}')
    (folder / "gone.json").symlink_to("nowhere.json")
    importers.import_folder(folder, tmp_path / "out")
    assert all_captions(tmp_path / "out")["3.jpg"] == ["ball 3", "one ball"]
    assert f"left out 1 .json file without an image: {folder}/6.json\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    "value",
    [
        "\\N",
        "#N/D",
        "#NOM?",
        "#VALEUR!",
        "#RIF!",
        "#Н/Д",
        "#ÜBERLAUF!",
        "#UNKNOWN!",
        "#¡VALOR!",
        "#¿NOMBRE?",
        "#ref!",
        "#NA",
        "-nan",
        "NaT",
        "undefined",
    ],
)
def test_what_programs_write_for_a_missing_caption_is_none(value):
    assert clean_caption(value, "c.csv") == ""


@pytest.mark.parametrize("value", ["#dog", "#sunset!", "a #1 dog", "Nan's dog", "none of the dogs", "c#/d"])
def test_captions_that_resemble_missing_ones_are_captions(value):
    assert clean_caption(value, "c.csv") == value


@pytest.mark.parametrize(
    "value",
    [
        "[/EN#1/people Two men] talk",
        "a &#39;dog&#39;",
        "a dog &amp; a cat",
        "<PERSON> runs",
    ],
)
def test_markup_in_captions_is_reported(tmp_path, capsys, value):
    importers.import_folder(
        six(tmp_path / "in", c__csv=csv_rows("image|caption", f"{{}}.jpg|{value}")), tmp_path / "out"
    )
    assert "read 6 captions with marks such as <start>, which are learned as words" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["a manâ€™s dog", "caf\ufffd sign"])
def test_captions_that_were_decoded_wrongly_are_reported(tmp_path, capsys, value):
    importers.import_folder(
        six(tmp_path / "in", c__csv=csv_rows("image,caption", f"{{}}.jpg,{value}")), tmp_path / "out"
    )
    told = "read 6 captions with letters of a wrong encoding; save their file as UTF-8 anew, the first is"
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(("start", "kind"), [("{\\rtf1 a ball}", "an RTF document"), ("<!DOCTYPE html>", "a web page")])
def test_documents_that_are_no_plain_text_are_refused(tmp_path, start, kind):
    folder = six(tmp_path / "in", **{f"{i}__txt": start for i in range(6)})
    with pytest.raises(InputError, match=rf"0\.txt is {kind}, not a text file; (save it as plain text|download)"):
        importers.import_folder(folder, tmp_path / "out")


def test_texts_that_are_named_almost_like_their_images_are_named(tmp_path):
    folder = six(tmp_path / "in", **{f"{i}_caption__txt": "a ball" for i in range(6)})
    with pytest.raises(InputError, match=r"rename .*in/0_caption\.txt to 0\.txt if it holds the captions"):
        importers.import_folder(folder, tmp_path / "out")
