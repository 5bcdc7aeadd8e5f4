"""Boxes against loops and known overlaps."""

from __future__ import annotations

import torch

from bifusion_diag.model.losses.boxes import box_iou_loss, object_boxes, query_centres


def test_known_overlaps() -> None:
    cube = torch.tensor([[0.0, 0.0, 0.0, 1.0, 1.0, 1.0]])
    for shift, iou in ((0.0, 1.0), (0.5, 1 / 3), (1.0, 0.0), (7.0, 0.0)):
        moved = cube + torch.tensor([[shift, 0.0, 0.0, 0.0, 0.0, 0.0]])
        torch.testing.assert_close(box_iou_loss(moved, cube), torch.tensor(1 - iou))
    # A 2 × 1 × 1 box around the cube: overlap 1, union 2.
    wide = torch.tensor([[0.0, 0.0, 0.0, 2.0, 1.0, 1.0]])
    torch.testing.assert_close(box_iou_loss(torch.cat([wide, cube]), torch.cat([cube, cube])), torch.tensor(0.25))


def test_boxes_enclose_the_points_of_each_object() -> None:
    coords = torch.randn(40, 3)
    masks = torch.rand(3, 40) < 0.3
    masks[2] = torch.arange(40) == 17
    for box, mask in zip(object_boxes(coords, masks), masks, strict=True):
        low, high = coords[mask].amin(0), coords[mask].amax(0)
        torch.testing.assert_close(box, torch.cat([(low + high) / 2, high - low]))


def test_a_query_sits_at_its_superpoint() -> None:
    coords, superpoint = torch.randn(10, 3), torch.arange(10) % 3
    centres = query_centres(coords, superpoint, 3, torch.tensor([2, -1, 0]))
    expected = torch.stack([coords[superpoint == 2].mean(0), coords.mean(0), coords[superpoint == 0].mean(0)])
    torch.testing.assert_close(centres, expected)
