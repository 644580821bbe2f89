"""Where the video's tokens lie, and the orders that planners put them in."""

import pytest
import torch
from pack.attention.layout import TILE, VideoLayout, hilbert, in_sections, tile_major
from video_oracle import LAYOUTS, frame_and_patch, hilbert_curve, is_text, video_rows

CPU = torch.device("cpu")


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_rows_of_text_and_video_share_out_the_sequence(layout):
    text = is_text(layout)
    assert layout.sink_rows(CPU).tolist() == text.nonzero()[:, 0].tolist()
    assert layout.video_rows(CPU).flatten().tolist() == (~text).nonzero()[:, 0].tolist()
    assert layout.seq_len == len(text) and layout.sink_tokens == int(text.sum()) and layout.video_tokens == int((~text).sum())
    frame, patch = frame_and_patch(layout)
    row = layout.video_rows(CPU)[layout.frames - 1, 2, 4]
    assert (int(frame[row]), int(patch[row])) == (layout.frames - 1, 2 * layout.width + 4)


def test_a_layout_reads_as_a_person_writes_it():
    assert str(VideoLayout(5, 8, 9)) == "5 x 8 x 9 video tokens"
    assert str(VideoLayout(5, 8, 9, prefix=4, suffix=7)) == "4 + 5 x 8 x 9 video tokens + 7"


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_tile_order_is_box_after_box(layout):
    """A permutation too, since the expected list is one."""
    assert tile_major(layout.video_rows(CPU)).tolist() == video_rows(layout, "tile")


@pytest.mark.parametrize("size", [(4, 4, 4), (8, 8, 12), (4, 16, 8)], ids=str)
def test_every_run_of_a_tiles_size_is_a_compact_box(size):
    frames, height, width = size
    runs = tile_major(torch.arange(frames * height * width, dtype=torch.int32).view(size)).view(-1, 4 * 4 * 4).long()
    for axis, coordinate in enumerate((runs // (height * width), runs // width % height, runs % width)):
        assert (coordinate.amax(1) - coordinate.amin(1) == TILE[axis] - 1).all() and (coordinate.amin(1) % TILE[axis] == 0).all()


@pytest.mark.parametrize("size", [(1, 1, 1), (1, 1, 2), (2, 1, 1), (3, 5, 7), (13, 1, 6), (1, 17, 4), (5, 30, 52), (33, 9, 2), (8, 8, 8)], ids=str)
def test_hilbert_order_holds_every_row_once(size):
    rows = torch.arange(torch.Size(size).numel(), dtype=torch.int32).view(size) + 7
    assert sorted(hilbert(rows).tolist()) == rows.flatten().tolist() and hilbert(rows).dtype == torch.int32


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_each_step_of_a_full_cube_goes_to_a_neighbour(bits):
    edge = 2**bits
    walk = hilbert(torch.arange(edge**3, dtype=torch.int32).view(edge, edge, edge)).long()
    at = torch.stack([walk // edge**2, walk // edge % edge, walk % edge], 1)
    assert ((at[1:] - at[:-1]).abs().sum(1) == 1).all()
    # Each aligned run of 8, 64, ... is a cube: so a block of 64 keys is as compact as a tile.
    for inner in range(1, bits):
        runs = (at >> inner).view(-1, 8**inner, 3)
        assert (runs == runs[:, :1]).all()
    assert at.tolist() == [list(one) for one in hilbert_curve(bits)]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_hilbert_order_of_other_videos_is_the_cubes_without_what_lies_outside(layout):
    assert hilbert(layout.video_rows(CPU)).tolist() == video_rows(layout, "hilbert")


@pytest.mark.parametrize("size", [(13, 16, 24), (21, 30, 52), (21, 45, 80)], ids=str)
def test_blocks_of_hilbert_order_are_compact_whatever_the_size(size):
    """Sizes of real videos, which are no multiples of a box. Extents are in tokens, of a block's longest side."""
    rows = torch.arange(torch.Size(size).numel()).view(size)

    def longest_sides(order, block):
        at = torch.stack(torch.unravel_index(order(rows), size), 1)
        blocks = at[: len(at) // block * block].view(-1, block, 3)
        return (blocks.amax(1) - blocks.amin(1)).amax(1) + 1

    for block in (64, 128):
        compact, boxes, lines = (longest_sides(order, block) for order in (hilbert, tile_major, torch.flatten))
        assert (compact > 16).float().mean() < 0.01 <= (lines > 16).float().mean()
        if block == 128:
            assert (boxes > 16).float().mean() > 0.05


def test_sections_start_at_block_edges_and_padding_is_only_at_their_ends():
    rows = in_sections([torch.arange(5), torch.arange(0), torch.arange(5, 13)], 4)
    assert rows.tolist() == [0, 1, 2, 3, 4, -1, -1, -1, 5, 6, 7, 8, 9, 10, 11, 12]
