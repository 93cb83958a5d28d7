"""common/patterns.py: which files fit a pattern, their keys and groups."""

import pytest

from common.config import Data
from common.console import UserError
from common.patterns import fill, find_files, pictures_below


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def keys(root, pattern, skip=()):
    return {found.path: found.key for found in find_files(root, pattern, skip)}


@pytest.mark.parametrize(("pattern", "expected"), [
    ("{key}.png", {"a.png": "a", "b.PNG": "b", "c.tif": "c"}),
    ("{key}.jpg", {"a.png": "a", "b.PNG": "b", "c.tif": "c"}),
    ("{key}.*", {"a.png": "a", "b.PNG": "b", "c.tif": "c"}),
    ("{key}.txt", {"notes.txt": "notes"}),
    ("*/{key}.png", {"s 1/a.png": "s 1-a", "s2/a.jpeg": "s2-a", "deep/a.png": "deep-a"}),
    ("{group}/{key}.png", {"s 1/a.png": "s 1-a", "s2/a.jpeg": "s2-a", "deep/a.png": "deep-a"}),
    ("s*/{key}.png", {"s 1/a.png": " 1-a", "s2/a.jpeg": "2-a"}),
    ("**/{key}.png", {"a.png": "a", "b.PNG": "b", "c.tif": "c", "s 1/a.png": "s 1-a", "s2/a.jpeg": "s2-a",
                      "deep/x/y/a.png": "deep-x-y-a", "deep/a.png": "deep-a"}),
    ("deep/**/{key}.png", {"deep/a.png": "a", "deep/x/y/a.png": "x-y-a"}),
    ("**/y/{key}.png", {"deep/x/y/a.png": "deep-x-a"}),
    ("{key}/*.png", {"s 1/a.png": "s 1", "s2/a.jpeg": "s2", "deep/a.png": "deep"}),
    ("deep/{key}/y/*.png", {"deep/x/y/a.png": "x"}),
])
def test_keys_join_folders_and_names(tmp_path, pattern, expected):
    touch(tmp_path, "a.png", "b.PNG", "c.tif", ".hidden.png", "notes.txt", "s 1/a.png", "s2/a.jpeg", "deep/x/y/a.png",
          "deep/a.png", ".cache/a.png", "filter/histograms.png")
    assert keys(tmp_path, pattern, skip=["filter"]) == expected


def test_the_group_is_a_folder_or_a_part_of_a_name(tmp_path):
    touch(tmp_path, "P07/x/t_1.png", "P08/y/t_1.png", "P07_a_3.png")
    found = find_files(tmp_path, "{group}/*/{key}.png")
    assert [(file.key, file.group) for file in found] == [("P07-x-t_1", "P07"), ("P08-y-t_1", "P08")]
    found = find_files(tmp_path, "{group}_{key}.png")
    assert [(file.key, file.group) for file in found] == [("P07-a_3", "P07")]


def test_the_key_does_not_depend_on_where_its_parts_stand(tmp_path):
    touch(tmp_path, "P07/img/t1.png", "seg/t1_P07.png", "x/t1/P07/y.png")
    assert [keys(tmp_path, pattern) for pattern in ("{group}/img/{key}.png", "seg/{key}_{group}.png",
                                                    "x/{key}/{group}/y.png")] == [
        {"P07/img/t1.png": "P07-t1"}, {"seg/t1_P07.png": "P07-t1"}, {"x/t1/P07/y.png": "P07-t1"}]
    found, = find_files(tmp_path, "{group}/img/{key}.png")
    assert fill("seg/{key}_{group}.png", found) == "seg/t1_P07.png"


def test_a_wildcard_in_the_name_of_a_file_is_not_part_of_the_key(tmp_path):
    touch(tmp_path, "a_x=1_HE.png", "b_x=22.png")
    assert keys(tmp_path, "{key}_*.png") == {"a_x=1_HE.png": "a", "b_x=22.png": "b"}


def test_all_pictures_below_the_fixed_folders_of_a_pattern_are_found(tmp_path):
    touch(tmp_path, "x/f#1.png", "x/sub/F#2.png", "x/f3.TIF", "x/notes.txt", "y/f#4.png", "x/.f#5.png", "x/.h/6.png",
          "x/filter/7.png", ".z/8.png")
    assert [*pictures_below(tmp_path, ".z/{key}.png", ())] == [".z/8.png"]
    assert sorted(pictures_below(tmp_path, "x/f#{key}.png", {"x/filter"})) == ["x/f#1.png", "x/f3.TIF", "x/sub/F#2.png"]
    assert len([*pictures_below(tmp_path, "{group}/f#{key}.png", {"x/filter"})]) == 4
    assert len([*pictures_below(tmp_path, "{group}/f#{key}.png", ())]) == 5


def test_links_to_folders_do_not_lead_in_circles(tmp_path):
    touch(tmp_path, "s/a.png")
    (tmp_path / "s/round").symlink_to(tmp_path / "s", target_is_directory=True)
    assert keys(tmp_path, "**/{key}.png") == {"s/a.png": "s-a"}


def test_a_missing_partner_is_named_where_it_is_expected(tmp_path):
    touch(tmp_path, "P07/a/img/t1.png")
    found, = find_files(tmp_path, "{group}/*/img/{key}.png")
    assert fill("{group}/*/mask/{key}_mask.png", found) == "P07/a/mask/t1_mask.png"


@pytest.mark.parametrize(("settings", "expected"), [
    ({"images": "*/{key}.png"}, "same wildcards"), ({"images": "{group}/{key}.png"}, "same wildcards"),
    ({"images": "{group}/{key}.png", "masks": "{group}/{key}_m.png", "group": "x"}, "leave out one"),
    ({"images": "a**/{key}.png"}, r"\*\* only in place of a whole folder"),
    ({"images": "{key}.png/**"}, "whole folder"),
    ({"images": "{group}/{group}/{key}.png"}, "{group} once"), ({"images": "x/{key}/{key}.png"}, "exactly once"),
])
def test_patterns_that_cannot_work_are_rejected(settings, expected):
    with pytest.raises(UserError, match=expected):
        Data(**settings)
