"""Pictures of a ticket: the pixels that it reads, its first kernels, its masks."""

import dataclasses
from collections.abc import Mapping

import keras
import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

import masked_layers as ml
from lottery_ticket_pruner import pictures
from lottery_ticket_pruner.variables import read

_KERNELS = 64  # Kernels in a picture.
_CELLS = 48  # Cells of a mask in each direction.
_MASKS = 8  # Masks in a picture.
# Readable on light and on dark pages. In a picture of pixels, colors do not follow the page.
_POSITIVE, _NEGATIVE = "#2B86C9", "#E0702B"


@dataclasses.dataclass(frozen=True, eq=False)
class Portrait:
    """Pictures of one ticket as arrays.

    Attributes:
        units: Number of units of the first layer.
        readers: Number of these units that read each pixel, of shape (height, width). None if the
            first masked layer does not read pixels.
        kernels: Kernels of the first masked convolution, summed over its input channels, of shape
            (kernels, height, width). NaN where all of these weights are pruned. None if there is no
            convolution.
        masks: Share of kept weights in each block of each mask, from inputs (rows) to units
            (columns), by path.
    """

    units: int
    readers: np.ndarray | None
    kernels: np.ndarray | None
    masks: dict[str, np.ndarray]


def portrait_of(model: keras.Model, masks: Mapping[str, np.ndarray]) -> Portrait:
    """Returns the portrait of a masked model.

    Args:
        model: The model.
        masks: Its masks by path.
    """
    readers, kernels, units = None, None, 0
    shape = getattr(model, "input_shape", None)
    first = next(iter(masks.values()), np.zeros(()))
    if isinstance(shape, tuple) and len(shape) in (3, 4) and None not in shape[1:]:
        pixels = shape[1:] if len(shape) == 4 else (*shape[1:], 1)
        if first.ndim == 2 and len(first) == np.prod(pixels):
            read_by = first.reshape(*pixels, -1).any(axis=2)
            readers, units = read_by.sum(-1), first.shape[1]
    for ref in ml.masked_refs(model):
        if kernels is None and len(ref.variable.shape) == 4 and ref.path in masks:
            kept = masks[ref.path]
            values = np.where(kept, read(ref.variable), 0.0).sum(2)
            values = np.where(kept.any(2), values, np.nan)
            kernels = np.moveaxis(values, -1, 0)[:_KERNELS]
    return Portrait(units, readers, kernels, {path: _blocks(m) for path, m in masks.items()})


def pixels_figure(portrait: Portrait) -> Figure:
    """Plots how many units of the first layer read each pixel."""
    assert portrait.readers is not None
    figure, axes = pictures.new_figure(3.6, 3.4)
    most = max(int(portrait.readers.max()), 1)
    axes.imshow(_tinted(portrait.readers / most), interpolation="none")
    if portrait.readers.size <= 1024:
        for (row, column), count in np.ndenumerate(portrait.readers):
            text = f"row {row}, column {column}: read by {count} of {portrait.units} units"
            pictures.add_target(axes, column, row, text)
    axes.set_xticks([0, portrait.readers.shape[1] - 1])
    axes.set_yticks([0, portrait.readers.shape[0] - 1])
    return figure


def describe_pixels(portrait: Portrait) -> str:
    """Returns the caption of `pixels_figure`."""
    assert portrait.readers is not None
    unread = int((portrait.readers == 0).sum())
    return (
        f"Empty: read by no kept weight ({unread:,} of {portrait.readers.size:,} pixels). Fullest "
        f"color: read by {int(portrait.readers.max()):,} of the {portrait.units:,} units of the "
        "first layer."
    )


def kernels_figure(portrait: Portrait) -> Figure:
    """Plots the kernels of the first convolution side by side."""
    assert portrait.kernels is not None
    count, height, width = portrait.kernels.shape
    across = min(8, count)
    down = -(-count // across)
    sheet = np.full((down * (height + 1) - 1, across * (width + 1) - 1), np.nan)
    for number, kernel in enumerate(portrait.kernels):
        top, left = number // across * (height + 1), number % across * (width + 1)
        sheet[top : top + height, left : left + width] = kernel
    figure, axes = pictures.new_figure(3.6, 0.3 + 3.3 * sheet.shape[0] / sheet.shape[1])
    largest = np.nanmax(np.abs(sheet)) if np.isfinite(sheet).any() else 1.0
    axes.imshow(_signed(sheet / (largest or 1.0)), interpolation="none")
    axes.axis("off")
    return figure


def masks_figure(portrait: Portrait) -> Figure:
    """Plots every mask as blocks, the fuller their color the more weights are kept."""
    masks = list(portrait.masks.items())[:_MASKS]
    across = min(3, len(masks))
    down = -(-len(masks) // across)
    figure, _ = pictures.new_figure(4.8, 0.3 + 1.75 * down)
    figure.clear()
    panels = figure.subplots(down, across, squeeze=False)
    for axes in panels.flat[len(masks) :]:
        axes.remove()
    for axes, (path, shares) in zip(panels.flat, masks, strict=False):
        axes.imshow(_tinted(shares), interpolation="none", aspect="auto")
        axes.set_title(pictures.wrapped(path), fontsize=8)
        axes.set_xticks([])
        axes.set_yticks([])
    panels[0, 0].set_ylabel("inputs", fontsize=8)
    panels[0, 0].set_xlabel("units", fontsize=8)
    return figure


def describe_masks(portrait: Portrait) -> str:
    """Returns the caption of `masks_figure`."""
    text = "The fuller the color, the more weights are kept in a block of inputs and units."
    if len(portrait.masks) > _MASKS:
        text += f" The first {_MASKS} of {len(portrait.masks)} masks."
    return text


def _blocks(mask: np.ndarray) -> np.ndarray:
    """Returns the share of kept entries in blocks of a mask as a matrix of inputs and units."""
    matrix = np.atleast_2d(mask.reshape(-1, mask.shape[-1]) if mask.ndim else mask).astype(float)
    for axis, size in enumerate(matrix.shape):
        if size > _CELLS:
            starts = np.linspace(0, size, _CELLS, endpoint=False).astype(int)
            sums = np.add.reduceat(matrix, starts, axis=axis)
            lengths = np.diff([*starts, size])
            matrix = sums / (lengths[:, None] if axis == 0 else lengths)
    return matrix


def _tinted(shares: np.ndarray) -> np.ndarray:
    """Returns shares as pixels of one color that hide more of the page the larger they are."""
    image = np.empty((*shares.shape, 4))
    image[..., :3] = to_rgb(_POSITIVE)
    image[..., 3] = np.where(shares > 0, 0.3 + 0.7 * shares, 0)
    return image


def _signed(values: np.ndarray) -> np.ndarray:
    """Returns values from -1 to 1 as pixels of two colors, fully transparent where NaN."""
    image = np.empty((*values.shape, 4))
    image[..., :3] = np.where((values >= 0)[..., None], to_rgb(_POSITIVE), to_rgb(_NEGATIVE))
    image[..., 3] = np.where(np.isnan(values), 0, 0.12 + 0.88 * np.abs(np.nan_to_num(values)))
    return image
