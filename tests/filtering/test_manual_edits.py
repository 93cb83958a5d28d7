"""Verdicts and notes that a person wrote into tiles.csv survive later runs of the filter."""

from dataclasses import replace

import pytest
from helpers import write_pairs

from common.console import UserError
from dataset import Tile, write_tiles
from filtering.manual_edits import apply_manual_edits, differences, read_earlier_list

LIST = [Tile(f"{group}{i}", f"f{group}{i}", f"m{group}{i}", group, proposed=split, split=split)
        for group, split in (("a", "train"), ("b", "test"), ("c", "train")) for i in range(3)]
PROPOSED = [replace(tile, split="") for tile in LIST]  # as the filter hands them over
HEADER = b'"key";"image";mask;split;proposed'


def listed(tiles):
    return {tile.key: tile for tile in tiles}


def edited(tile, split, note=""):
    """The row after a person edited it."""
    return replace(tile, split=split, note=note)


def test_a_group_moved_by_hand_stays_moved_whatever_is_proposed():
    before = [edited(tile, "test") if tile.group == "c" else tile for tile in LIST]
    after = apply_manual_edits(PROPOSED, before)
    assert {tile.split for tile in after if tile.group == "c"} == {"test"}
    new = Tile("c9", "fc9", "mc9", "c", proposed="train")  # a tile that joins the group later follows it
    after = listed(apply_manual_edits([*PROPOSED, new], before))
    assert after["c9"].split == after["c9"].proposed == "test" and not after["c9"].manual_verdict
    assert after["c0"].manual_verdict == "test" and after["a0"].split == "train" and not after["a0"].manual_verdict


def test_a_tile_kept_by_hand_joins_its_group_on_the_other_side_too():
    before = [replace(LIST[0], proposed="sparse", split="train", note="fine"), *LIST[1:]]
    now = [replace(PROPOSED[0], proposed="sparse"), *(replace(tile, proposed="test") for tile in PROPOSED[1:3]),
           *PROPOSED[3:]]
    after = apply_manual_edits(now, before)
    kept = listed(after)["a0"]
    assert (kept.split, kept.proposed, kept.manual_verdict, kept.note) == ("test", "sparse", "test", "fine")
    assert differences(before, HEADER, after) == ["set by hand and kept (1): a0 (sparse -> test)",
                                                  "groups that change sides (1): a (train -> test)"]


@pytest.mark.parametrize("verdict", ["train", "corrupt"])
def test_a_verdict_set_by_hand_outlives_runs_in_which_the_filter_agrees_or_cannot_read(verdict):
    dropped = [replace(PROPOSED[0], proposed="misregistered"), *PROPOSED[1:]]
    before = apply_manual_edits(dropped, [])
    first = apply_manual_edits(dropped, [edited(before[0], "train", "checked"), *before[1:]])
    assert listed(first)["a0"].split == "train"
    second = apply_manual_edits([replace(PROPOSED[0], proposed=verdict), *PROPOSED[1:]], first)
    assert listed(second)["a0"].split == verdict
    third = listed(apply_manual_edits(dropped, second))["a0"]
    assert (third.split, third.manual_verdict, third.note) == ("train", "train", "checked")


def test_setting_back_what_is_proposed_takes_a_verdict_back():
    first = apply_manual_edits(PROPOSED, [edited(LIST[0], "excluded"), *LIST[1:]])
    assert listed(first)["a0"].split == "excluded"
    after = listed(apply_manual_edits(PROPOSED, [edited(first[0], "train"), *first[1:]]))["a0"]
    assert (after.split, after.by_hand) == ("train", "")
    again = listed(apply_manual_edits(PROPOSED, [edited(first[0], "misregistered"), *first[1:]]))["a0"]
    assert again.split == again.by_hand == "misregistered"


def test_notes_of_tiles_that_nobody_overruled_are_kept():
    after = apply_manual_edits([replace(PROPOSED[0], reason="same image as a1"), *PROPOSED[1:]],
                               [edited(LIST[0], "train", "ask again"), *LIST[1:]])
    assert (after[0].note, after[0].reason) == ("ask again", "same image as a1")


def test_a_key_that_a_spreadsheet_changed_is_found_by_its_image():
    after = apply_manual_edits(PROPOSED, [replace(edited(LIST[0], "excluded"), key="0"), *LIST[1:]])
    assert after[0].key == "a0" and after[0].split == "excluded"


def test_what_cannot_be_kept_is_said():
    before = [edited(LIST[0], "excluded"), replace(LIST[1], proposed="sparse", split="train"),
              edited(LIST[2], "excluded"), *LIST[3:]]
    now = [replace(PROPOSED[1], proposed="corrupt"), replace(PROPOSED[2], group="z"), *PROPOSED[3:],
           Tile("d0", "fd0", "md0", "d", proposed="train")]
    after = apply_manual_edits(now, before)
    assert listed(after)["a1"].split == "corrupt" and listed(after)["a2"].split == "excluded"
    text = "\n".join(differences(before, HEADER + b";comment", after))
    for expected in ("set by hand and kept (1): a2 (train -> excluded)", "not in force (1): a1 (train, now corrupt)",
                     "gone from the folder (1): a0", "rows deleted) (1): d0", "now in another group (1): a2 (a -> z)",
                     "write notes into `note` (1): comment"):
        assert expected in text
    assert not differences(LIST, HEADER, apply_manual_edits(PROPOSED, LIST))


def test_a_list_without_proposals_says_what_changes():
    before = [replace(tile, proposed="") for tile in LIST]
    after = apply_manual_edits([replace(PROPOSED[0], proposed="sparse"), *PROPOSED[1:]], before)
    assert "(1): a0 (train -> sparse)" in differences(before, HEADER, after)[0]


def test_a_link_at_fault_is_no_reason_to_delete_the_list(tmp_path):
    write_pairs(tmp_path / "tiles", 2)
    write_tiles(tmp_path / "tiles/tiles.csv", [
        Tile(str(i), f"frames/frame#{i}.png", f"masks/mask#{i}.png", split="train") for i in range(2)])
    file = tmp_path / "tiles/frames/frame#1.png"
    file.rename(tmp_path / "out.png")
    file.symlink_to(tmp_path / "out.png")
    with pytest.raises(UserError, match="leads out") as error:
        read_earlier_list(tmp_path / "tiles/tiles.csv", tmp_path / "tiles")
    assert "delete" not in str(error.value)
    (tmp_path / "tiles/tiles.csv").write_text("key\n")
    with pytest.raises(UserError, match="fix it, or delete it"):
        read_earlier_list(tmp_path / "tiles/tiles.csv", tmp_path / "tiles")
