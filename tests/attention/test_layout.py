"""Where the video's tokens lie, and the orders that planners put them in."""

import pytest
import torch
from pack.attention.layout import TILE, VideoLayout, in_sections, tile_major
from video_oracle import LAYOUTS, frame_and_patch, is_text, video_rows

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


def test_sections_start_at_block_edges_and_padding_is_only_at_their_ends():
    rows = in_sections([torch.arange(5), torch.arange(0), torch.arange(5, 13)], 4)
    assert rows.tolist() == [0, 1, 2, 3, 4, -1, -1, -1, 5, 6, 7, 8, 9, 10, 11, 12]
