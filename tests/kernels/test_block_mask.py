"""Masks whose full rows have no index list, and the tables that orders of the same rows share."""

import dataclasses

import pytest
import torch
from pack.kernels import BlockMask, SparsePlan, TokenOrder, density


def _blocks():
    """bool [1, 2, 4, 6]: full rows, an empty one, and otherwise at most three blocks of six."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.zeros(1, 2, 4, 6, dtype=torch.bool)
    for head in range(2):
        for row in range(4):
            blocks[0, head, row, torch.randperm(6, generator=generator)[:row]] = True
    blocks[0, 0, 1] = blocks[0, 1, 3] = True
    return blocks


@pytest.mark.parametrize(("max_count", "room"), [(None, 3), (3, 3), (4, 4), (6, 5), (99, 5)])
def test_full_rows_take_no_room(max_count, room):
    blocks = _blocks()
    mask = BlockMask.from_blocks(blocks, 16, 16, 60, 90, max_count=max_count)
    assert mask.kv_indices.shape[-1] == room < mask.num_k_blocks
    assert mask.full_rows.tolist() == blocks.all(-1).tolist() and mask.full_rows.any()
    assert torch.equal(mask.to_blocks(), blocks)


@pytest.mark.parametrize("room", [0, 1, 5])
def test_the_list_of_a_full_row_is_unread(room):
    mask = BlockMask(torch.full((1, 1, 2), 3, dtype=torch.int32), torch.full((1, 1, 2, room), 1 << 30, dtype=torch.int32), 16, 16, 30, 40)
    assert mask.to_blocks().all() and mask.to_dense().shape == (1, 1, 30, 40)
    assert torch.equal(density(SparsePlan(mask), 30, 40), torch.ones(1, 1, dtype=torch.float64))


def test_density_counts_full_rows():
    mask = BlockMask.from_blocks(_blocks(), 16, 16, 60, 90)
    assert torch.allclose(density(SparsePlan(mask), 60, 90), mask.to_dense().double().mean((2, 3)))


@pytest.mark.parametrize("block", [4, 8, 16])
def test_full_blocks_hold_no_padding(block):
    rows = torch.arange(60, dtype=torch.int32).repeat(2, 1)
    rows[0, 9] = rows[1, 40:45] = -1
    expected = [[start + block <= 60 and min(order[start : start + block]) >= 0 for start in range(0, 60, block)] for order in rows.tolist()]
    assert TokenOrder(rows, torch.zeros(1, 1, dtype=torch.int64)).full_blocks(block).tolist() == expected


def test_orders_of_the_same_rows_share_their_tables_and_others_do_not():
    rows = torch.arange(32, dtype=torch.int32)[None]
    order = TokenOrder(rows, torch.zeros(1, 1, dtype=torch.int64))
    table, places = order.full_blocks(8), order.positions(32)
    for view in (order.expand(2, 3), order.for_heads(torch.zeros(1, 4, dtype=torch.int64)), dataclasses.replace(order, head_order=order.head_order)):
        assert view.full_blocks(8) is table and view.positions(32) is places
    padded = rows.clone()
    padded[0, 3] = -1
    other = dataclasses.replace(order, rows=padded)
    assert other.full_blocks(8).tolist() == [[False, True, True, True]] and other.positions(32)[0, 3] == -1
    assert order.full_blocks(8).all()
