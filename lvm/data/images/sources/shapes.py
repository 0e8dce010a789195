"""Renderer of generated scenes: shapes as signed distances, all frames of a scene at once.

Lengths are relative to the image's side: the image is [0, 1] × [0, 1], x to the right, y down. A signed distance is
negative inside of a shape. Arrays are float32, frames first: [T, R, R].
"""

import colorsys
import dataclasses
from collections.abc import Callable, Collection, Sequence

import numpy as np
from jaxtyping import Bool, Float32

NEAR, FAR = 1.0, 10.0  # range of depths in meters
BACKGROUND_DEPTH = (9.5, 6.0)  # at the background's top and bottom row
BACKGROUND_NORMAL = np.array([0.0, -0.5, 0.75**0.5], np.float32)  # a plane that is nearer at the bottom
BULGE = 0.75  # sine of the outward tilt of a shape's normal at distance 1 from its center


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Folds the plane onto one tenth of the star and returns the distance to its one edge there."""
    cosine, sine = 0.80901699, 0.58778525  # of 36 degrees
    u, v = np.abs(u), -v
    for across in (cosine, -cosine):
        beyond = 2 * np.maximum(across * u - sine * v, 0)
        u, v = u - across * beyond, v + sine * beyond
    u, v = np.abs(u), v - 1.25
    edge_u, edge_v = 0.55 * sine, 0.55 * cosine - 1
    along = np.clip((u * edge_u + v * edge_v) / (edge_u**2 + edge_v**2), 0, 1.25)
    distance = np.sqrt((u - edge_u * along) ** 2 + (v - edge_v * along) ** 2)
    return np.copysign(distance, v * edge_u - u * edge_v)


_DISTANCES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "disk": lambda u, v: np.sqrt(u * u + v * v) - 1,
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) - 0.86,
    "triangle": lambda u, v: np.maximum(0.75**0.5 * np.abs(u) - 0.5 * v, v) - 0.62,
    "star": _star,
    "ring": lambda u, v: np.abs(np.sqrt(u * u + v * v) - 0.76) - 0.26,
}
CLASSES = tuple(_DISTANCES)
SHAPES = (2, 4)  # the fewest and the most in a scene, by default
MAX_SHAPES = 7  # more would not have depths of their own
TEXTURES = ("plain", "stripes", "checks", "dots")


@dataclasses.dataclass(frozen=True)
class Texture:
    """A periodic pattern of two RGB colors in [0, 255], fixed to the surface."""

    pattern: str
    period: float
    colors: tuple[Float32[np.ndarray, "3"], Float32[np.ndarray, "3"]]


@dataclasses.dataclass(frozen=True)
class Shape:
    """A shape at frame 0, and its motion; it bounces off the image's borders."""

    class_id: int  # index in `CLASSES`
    depth: float  # meters from the viewer; constant
    radius: float  # mean size
    pulse: float  # change of size, a fraction
    pulse_rate: float  # radians per frame
    phase: float  # of the pulse at frame 0
    center: np.ndarray  # (x, y)
    velocity: np.ndarray  # per frame
    angle: float  # radians
    spin: float  # radians per frame
    texture: Texture


@dataclasses.dataclass(frozen=True)
class Scene:
    """Shapes, back to front, and the texture of the background."""

    shapes: tuple[Shape, ...]
    background: Texture


def sample_scene(
    rng: np.random.Generator, shapes: tuple[int, int] = SHAPES, class_hues: bool = False,
    textures: Sequence[str] = TEXTURES,
) -> Scene:  # fmt: skip
    """Samples a scene: a background and, between the two bounds inclusive, a number of shapes.

    With `class_hues`, a shape's hues are near that of its class; otherwise a color tells nothing of the class. Surfaces
    have one of `textures`, half of them "plain" if it is among others: their motion is predictable from few frames.
    """
    count = int(rng.integers(shapes[0], shapes[1] + 1))
    depths = np.linspace(5, 1.5, count) + rng.uniform(-0.25, 0.25, count)  # descending
    sampled = tuple(_sample_shape(rng, count, float(depth), class_hues, textures) for depth in depths)
    hue, value = rng.uniform(), rng.uniform(0.3, 0.7)
    colors = (_rgb(hue, 0.3, value), _rgb(hue + rng.uniform(-0.05, 0.05), 0.33, value * 0.9))
    return Scene(sampled, Texture(_sample_pattern(rng, textures), rng.uniform(0.22, 0.4), colors))


def _sample_pattern(rng: np.random.Generator, textures: Sequence[str]) -> str:
    others = max(1, len(textures) - 1)
    shares = np.array([others if name == "plain" else 1 for name in textures])
    return str(rng.choice(textures, p=shares / shares.sum()))


def _sample_shape(
    rng: np.random.Generator, count: int, depth: float, class_hues: bool, textures: Sequence[str]
) -> Shape:
    hue, bright = rng.uniform(), (rng.uniform(0.45, 0.8), rng.uniform(0.8, 0.95))
    shift, dark = rng.uniform(-0.1, 0.1), (rng.uniform(0.5, 0.8), rng.uniform(0.6, 0.75))
    direction, speed = rng.uniform(0, 2 * np.pi), rng.uniform(0.015, 0.04)
    class_id = int(rng.integers(len(CLASSES)))
    if class_hues:  # the middle half of the class's share of the circle
        hue, shift = (class_id + 0.25 + hue / 2) / len(CLASSES), shift / 4
    return Shape(
        class_id=class_id,
        depth=depth,
        radius=rng.uniform(0.8, 1.2) * 0.325 / count**0.5,
        pulse=rng.uniform(0.0, 0.1),
        pulse_rate=rng.uniform(0.3, 0.7),
        phase=rng.uniform(0, 2 * np.pi),
        center=rng.uniform(0.2, 0.8, 2),
        velocity=speed * np.array([np.cos(direction), np.sin(direction)]),
        angle=rng.uniform(0, 2 * np.pi),
        spin=rng.choice([-1, 1]) * rng.uniform(0.03, 0.15),
        texture=Texture(
            _sample_pattern(rng, textures), rng.uniform(0.18, 0.26), (_rgb(hue, *bright), _rgb(hue + shift, *dark))
        ),
    )


def _rgb(hue: float, saturation: float, value: float) -> Float32[np.ndarray, "3"]:
    return np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value), np.float32) * 255


@dataclasses.dataclass(frozen=True)
class _Layer:
    """A shape in all frames: signed distance in pixels, texture in [0, 1], offset from its center in radii."""

    distance: Float32[np.ndarray, "T R R"]
    pattern: Float32[np.ndarray, "T R R"] | float
    dx: Float32[np.ndarray, "T 1 R"]
    dy: Float32[np.ndarray, "T R 1"]


def render(scene: Scene, T: int, R: int, streams: Collection[str]) -> dict[str, np.ndarray]:
    """Renders the maps of those streams that have one.

    Returns:
      rgb uint8 [T, R, R, 3]; segmentation (class id + 1, 0 is background) uint8 [T, R, R]; depth in meters, float32
      [T, R, R]; edges in [0, 1], float32 [T, R, R]; normals float32 [T, R, R, 3]. And always `front`, uint8
      [T, R, R]: the number of the visible shape, from 1, or 0.
    """
    front = np.zeros((T, R, R), np.uint8)
    edges = np.zeros((T, R, R), np.float32)
    rgb = _background(scene.background, R).repeat(T, axis=1)  # [3, T, R, R]
    normals = np.tile(BACKGROUND_NORMAL[:, None, None, None], (1, T, R, R))
    for number, shape in enumerate(scene.shapes, start=1):
        layer = _layer(shape, T, R)
        inside = layer.distance < 0
        front[inside] = number
        if "rgb" in streams:
            _blend(rgb, layer, shape.texture)
        if "edges" in streams:
            line = np.clip(max(0.9, R / 192) + 0.5 - np.abs(layer.distance), 0, 1)  # about two pixels wide
            edges[inside] = 0  # hides the borders behind the shape
            np.maximum(edges, line, out=edges)
        if "normals" in streams:
            _bulge(normals, layer, inside)
    maps: dict[str, np.ndarray] = {"front": front, "edges": edges, "normals": normals.transpose(1, 2, 3, 0)}
    if "rgb" in streams:
        maps["rgb"] = np.rint(rgb.transpose(1, 2, 3, 0)).astype(np.uint8)
    if "segmentation" in streams:
        maps["segmentation"] = np.array([0] + [s.class_id + 1 for s in scene.shapes], np.uint8)[front]
    if "depth" in streams:
        plane = np.linspace(*BACKGROUND_DEPTH, R, dtype=np.float32)[:, None]  # [R, 1]
        depths = np.array([0] + [s.depth for s in scene.shapes], np.float32)
        maps["depth"] = np.where(front == 0, plane, depths[front])
    return {name: maps[name] for name in ("front", *streams) if name in maps}


def _layer(shape: Shape, T: int, R: int) -> _Layer:
    t = np.arange(T)[:, None]  # [T, 1]
    radius = shape.radius * (1 + shape.pulse * np.sin(shape.phase + shape.pulse_rate * t))  # [T, 1]
    margin = 0.8 * shape.radius
    extent = 1 - margin - margin
    # Reflected into [margin, 1 - margin], repeatedly if necessary.
    center = margin + extent - np.abs((shape.center + shape.velocity * t - margin) % (2 * extent) - extent)  # [T, 2]
    pixels = (np.arange(R) + 0.5) / R  # [R]
    dx = ((pixels - center[:, :1]) / radius).astype(np.float32)[:, None, :]  # [T, 1, R]
    dy = ((pixels - center[:, 1:]) / radius).astype(np.float32)[:, :, None]  # [T, R, 1]
    angle = (shape.angle + shape.spin * t)[:, :, None]  # [T, 1, 1]
    cosine, sine = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    u = cosine * dx + sine * dy  # [T, R, R]
    v = cosine * dy - sine * dx  # [T, R, R]
    distance = _DISTANCES[CLASSES[shape.class_id]](u, v)
    distance *= (radius * R).astype(np.float32)[:, :, None]  # [T, R, R], pixels
    period = shape.texture.period / shape.radius
    return _Layer(distance, _pattern(shape.texture, u, v, period, shape.texture.period * R), dx, dy)


def _pattern(texture: Texture, u: np.ndarray, v: np.ndarray, period: float, period_px: float) -> np.ndarray | float:
    """Returns the blend of the two colors in [0, 1], borders one pixel wide; `period` is in units of u and v."""
    if texture.pattern == "plain":
        return 0.0
    frequency = np.float32(2 * np.pi / period)
    wave = np.sin(u * frequency)
    if texture.pattern == "checks":
        wave = wave * np.sin(v * frequency)
    elif texture.pattern == "dots":
        wave = wave + np.sin(v * frequency) - np.float32(0.5)
    return np.clip(np.float32(0.5) + wave * np.float32(period_px / (2 * np.pi)), 0, 1)


def _background(texture: Texture, R: int) -> Float32[np.ndarray, "3 1 R R"]:
    """Returns the background of one frame, darker towards its top."""
    pixels = ((np.arange(R) + 0.5) / R).astype(np.float32)
    x, y = pixels[None, :], pixels[:, None]
    u, v = np.broadcast_to((x + y) * np.float32(0.5**0.5), (R, R)), (x - y) * np.float32(0.5**0.5)
    pattern = np.broadcast_to(_pattern(texture, u, v, texture.period, texture.period * R), (R, R))
    first, second = (color[:, None, None] for color in texture.colors)
    return ((first + (second - first) * pattern) * (0.75 + 0.25 * y)).astype(np.float32)[:, None]


def _blend(rgb: Float32[np.ndarray, "3 T R R"], layer: _Layer, texture: Texture) -> None:
    """Blends a shape over rgb, with soft borders and light from the upper left."""
    cover = np.clip(0.5 - layer.distance, 0, 1)  # [T, R, R]
    light = np.clip(0.88 - 0.14 * (layer.dx + layer.dy), 0.5, 1)  # [T, R, R]
    first, second = texture.colors
    for channel in range(3):
        color = layer.pattern * (second[channel] - first[channel]) + first[channel]
        rgb[channel] += cover * (color * light - rgb[channel])


def _bulge(normals: Float32[np.ndarray, "3 T R R"], layer: _Layer, inside: Bool[np.ndarray, "T R R"]) -> None:
    """Sets the normals inside of a shape to those of a dome."""
    x, y = np.broadcast_arrays(layer.dx, layer.dy)
    nx, ny = BULGE * x[inside], BULGE * y[inside]  # [M]
    length = np.sqrt(nx * nx + ny * ny)
    shrink = np.minimum(1, 0.9 / np.maximum(length, 1e-6))  # the tips of a star are beyond radius 1
    nx, ny = nx * shrink, ny * shrink
    for axis, n in enumerate((nx, ny, np.sqrt(1 - nx * nx - ny * ny))):
        normals[axis][inside] = n
