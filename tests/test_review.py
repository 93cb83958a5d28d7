from dataclasses import replace

from dataset import Tile
from review import differences, honour

LIST = [Tile(f"{group}{i}", f"f{group}{i}", f"m{group}{i}", group, proposed=split, split=split)
        for group, split in (("a", "train"), ("b", "test"), ("c", "train")) for i in range(3)]


def by_key(tiles):
    return {tile.key: tile for tile in tiles}


def test_a_group_moved_by_hand_stays_moved_whatever_is_proposed():
    before = [replace(tile, split="test") if tile.group == "c" else tile for tile in LIST]
    after = honour(LIST, before)
    assert {tile.split for tile in after if tile.group == "c"} == {"test"}
    new = Tile("c9", "fc9", "mc9", "c", proposed="train")  # a tile that joins the group later follows it
    after = by_key(honour([*LIST, new], before))
    assert after["c9"].split == after["c9"].proposed == "test" and not after["c9"].set_by_hand
    assert after["c0"].set_by_hand and after["a0"].split == "train"


def test_a_tile_kept_by_hand_joins_its_group_on_the_other_side_too():
    before = [replace(LIST[0], proposed="sparse", split="train", note="fine"), *LIST[1:]]
    now = [replace(LIST[0], proposed="sparse"), *(replace(tile, proposed="test") for tile in LIST[1:3]), *LIST[3:]]
    after = by_key(honour(now, before))
    assert after["a0"].split == "test" and after["a0"].proposed == "sparse" and after["a0"].note == "fine"


def test_what_cannot_be_kept_is_said():
    before = [replace(LIST[0], split="excluded"), replace(LIST[1], proposed="sparse", split="train"),
              replace(LIST[2], split="excluded"), *LIST[3:]]
    now = [replace(LIST[1], proposed="corrupt", note="broken"), replace(LIST[2], group="z"), *LIST[3:],
           Tile("d0", "fd0", "md0", "d", proposed="train")]
    after = honour(now, before)
    assert by_key(after)["a1"].split == "corrupt" and by_key(after)["a2"].split == "excluded"
    text = "\n".join(differences(before, ["key", "split", "proposed", "comment"], after))
    for expected in ("set by hand and kept (1): a2 (train -> excluded)",
                     "set by hand and lost (1): a1 (train, now corrupt)",
                     "gone from the folder (1): a0", "rows deleted (1): d0",
                     "now in another group (1): a2 (a -> z)", "words belong into `note` (1): comment"):
        assert expected in text
    assert not differences(LIST, ["proposed"], honour(LIST, LIST))


def test_a_list_without_proposals_says_what_changes():
    before = [replace(tile, proposed="") for tile in LIST]
    after = honour([replace(LIST[0], proposed="sparse"), *LIST[1:]], before)
    assert "to tell those set by hand (1): a0 (train -> sparse)" in differences(before, ["key", "split"], after)[0]
