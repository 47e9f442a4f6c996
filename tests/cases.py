"""The shapes that tests and benchmarks share. Each row says which path it is there for."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ConvCase:
    """A conv block: input (batch, in_channels, height, width) and the block's own arguments."""

    name: str
    why: str
    in_channels: int
    out_channels: int
    height: int
    width: int
    kernel: int | tuple = 3
    stride: int | tuple = 1
    padding: int | tuple = 0
    dilation: int | tuple = 1
    groups: int = 1
    activation: str | None = "relu"
    pool_size: int | tuple | None = 2
    pool_stride: int | tuple | None = None
    pool_padding: int | tuple = 0
    ceil_mode: bool = False
    bias: bool = True
    batch: int = 3

    @property
    def kernel_size(self):
        return self.kernel if isinstance(self.kernel, tuple) else (self.kernel, self.kernel)

    @property
    def block_arguments(self):
        """Keyword arguments of ``FusedConvBlock``."""
        names = "in_channels out_channels stride padding dilation groups bias activation "
        names += "pool_size pool_stride pool_padding ceil_mode"
        return {"kernel_size": self.kernel, **{n: getattr(self, n) for n in names.split()}}

    @property
    def function_arguments(self):
        """Keyword arguments of ``functional.conv_block`` besides the tensors."""
        names = "stride padding dilation groups activation pool_size pool_stride pool_padding "
        names += "ceil_mode"
        return {n: getattr(self, n) for n in names.split()}

    @property
    def weight_shape(self):
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)


def _reference(name, why, c, k, size, **arguments):
    return ConvCase(name, why, c, k, size, size, **arguments)


# Layers of well-known small nets: what the benchmarks measure. `first` in `why` marks layers whose
# input needs no gradient.
REFERENCE = [
    _reference("mnist1", "first, mnist-cnn: no pool", 1, 32, 28, pool_size=None),
    _reference("mnist1-pool", "first, one channel, pooled", 1, 32, 28, padding=1),
    _reference("mnist2", "mnist-cnn: no padding", 32, 64, 26),
    _reference("deep2", "mnist-deep", 32, 64, 14, padding=1),
    _reference("deep3", "mnist-deep: odd map, last row and column dropped", 64, 128, 7, padding=1),
    _reference("cifar1", "first, three channels", 3, 16, 32, padding=1),
    _reference("cifar2", "cifar-cnn", 16, 32, 16, padding=1),
    _reference("cifar3", "cifar-cnn", 32, 64, 8, padding=1),
    _reference("wide1", "first, three channels, many outputs", 3, 64, 32, padding=1),
    _reference("wide2", "more channels", 64, 128, 16, padding=1),
    _reference("k5-rgb", "first, 5 x 5 kernel", 3, 32, 32, kernel=5, padding=2),
    _reference("lenet1", "first, LeNet: 6 output channels", 1, 6, 28, kernel=5, padding=2),
    _reference("lenet2", "LeNet: channel counts below a vector", 6, 16, 14, kernel=5),
    _reference("vgg2", "VGG-16: large map", 64, 64, 224, padding=1, batch=4),
    _reference(
        "alexnet1", "first, AlexNet: 11 x 11 kernel, stride 4, overlapping pool",
        3, 64, 224, kernel=11, stride=4, padding=2, pool_size=3, pool_stride=2, batch=16,
    ),
]  # fmt: skip

# Small cases, each for a corner of the arguments.
CORNERS = [
    ConvCase("plain", "fast path of every ISA", 8, 16, 10, 12, padding=1),
    ConvCase("tails", "channels that fill no vector", 5, 13, 9, 11, padding=1),
    ConvCase("one", "1 x 1 everything", 1, 1, 1, 1, kernel=1, pool_size=1),
    ConvCase("window-is-map", "the pool eats the whole map", 3, 4, 6, 6, pool_size=4),
    ConvCase("kernel-is-input", "kernel as large as the input", 2, 3, 5, 5, kernel=5,
             pool_size=None),
    ConvCase("column", "three runs of nine, which are no 3 x 3 taps of three channels", 9, 5, 8,
             7, kernel=(3, 1)),
    ConvCase("rgb-column", "three runs of three, which are no 3 x 3 taps of one channel", 3, 16, 8,
             7, kernel=(3, 1)),
    ConvCase("rect", "height and width differ in everything", 3, 5, 11, 14, kernel=(3, 2),
             stride=(2, 1), padding=(1, 0), pool_size=(2, 3), pool_stride=(1, 2)),
    ConvCase("dilated", "dilated kernel", 4, 6, 13, 13, dilation=2, padding=2),
    ConvCase("dilated-rect", "dilation by axis", 4, 6, 13, 17, dilation=(1, 3), padding=(1, 3)),
    ConvCase("groups", "grouped convolution", 6, 9, 10, 10, groups=3, padding=1),
    ConvCase("depthwise", "one channel a group", 8, 8, 10, 10, groups=8, padding=1),
    ConvCase("overlap", "overlapping windows: one position wins twice", 4, 8, 13, 13,
             pool_size=3, pool_stride=2),
    ConvCase("gaps", "windows that leave positions out", 4, 8, 13, 13, pool_size=2, pool_stride=3),
    ConvCase("pool-padded", "pool padding counts as minus infinity", 4, 8, 12, 12, padding=1,
             pool_size=3, pool_stride=2, pool_padding=1),
    ConvCase("pool-padded-signed", "pool padding next to negative values", 4, 8, 12, 12, padding=1,
             pool_size=3, pool_stride=2, pool_padding=1, activation=None),
    ConvCase("ceil", "ceil_mode: a partial last window", 4, 8, 12, 12, ceil_mode=True, pool_size=3,
             pool_stride=2),
    ConvCase("ceil-dropped", "ceil_mode: a last window in the padding is dropped", 2, 3, 5, 5,
             kernel=1, pool_size=2, pool_stride=3, pool_padding=1, ceil_mode=True),
    ConvCase("no-relu", "no ReLU", 4, 8, 10, 10, padding=1, activation=None),
    ConvCase("no-pool", "no pool", 4, 8, 10, 10, padding=1, pool_size=None),
    ConvCase("conv-only", "neither: nothing to remember", 4, 8, 10, 10, padding=1,
             activation=None, pool_size=None),
    ConvCase("no-bias", "no bias", 4, 8, 10, 10, padding=1, bias=False),
    ConvCase("strided", "convolution with a stride", 3, 8, 17, 17, stride=2, padding=1),
    ConvCase("lone-column", "windows of 1 x 1 whose next step would leave the map", 4, 8, 9, 6,
             padding=1, pool_size=1, pool_stride=(1, 6)),
    ConvCase("lone-window", "the same in both directions, channels in whole vectors", 16, 16, 5, 6,
             padding=1, pool_size=1, pool_stride=7),
    ConvCase("wide-window", "a window of more than 255 positions: 32-bit winners", 2, 3, 20, 18,
             kernel=1, pool_size=(17, 16), pool_stride=1),
    ConvCase("wide-window-vectors", "the same with channels in whole vectors", 2, 8, 20, 18,
             kernel=1, pool_size=(17, 16), pool_stride=1),
    ConvCase("padding-only", "padding wider than the kernel reaches", 2, 4, 4, 4, padding=3),
    ConvCase("batch-one", "one image", 8, 16, 10, 10, padding=1, batch=1),
    ConvCase("odd-map", "odd conv map: last row and column belong to no window", 16, 32, 7, 9,
             padding=1),
    ConvCase("large-window", "more positions than the fast paths take, 8-bit winners", 4, 8,
             13, 13, pool_size=5, pool_stride=3),
    ConvCase("many-images", "several images for each partial sum of the weight gradient", 2, 3,
             6, 6, batch=70),
    ConvCase("bands", "an image larger than 256 KiB, done in bands of rows", 16, 8, 22, 224,
             padding=1, batch=2),
    ConvCase("few-channels", "CPU: columns of the map in the lanes, the last of them outside", 3, 6,
             12, 37, kernel=5, padding=2, batch=2),
    ConvCase("few-channels-wide", "the same with the most channels, the widest kernel, no ReLU", 2,
             8, 15, 70, kernel=(4, 7), activation=None, batch=2),
    ConvCase("few-channels-bands", "the same in bands of rows", 64, 3, 20, 62, kernel=(5, 3),
             padding=(2, 1), batch=2),
    ConvCase("winograd-tails", "Winograd with output channels that fill no vector", 16, 21, 8, 10,
             padding=1, batch=5),
    ConvCase("winograd-bands", "Winograd on an image larger than 256 KiB", 32, 16, 20, 112,
             padding=1, batch=1),
    ConvCase("winograd-map", "Winograd without a pool, half tiles at both edges", 16, 21, 7, 9,
             padding=1, pool_size=None),
    ConvCase("winograd-map-bands", "the same on an image larger than 256 KiB, several bands", 64,
             17, 31, 57, padding=1, pool_size=None, batch=1),
    ConvCase("winograd-lone-row", "Winograd where the last band is one row", 32, 16, 33, 57,
             pool_size=None, batch=1),
    ConvCase("part-fragments", "channels that fill no fragment of a matrix unit", 13, 37, 9, 11,
             padding=1),
    ConvCase("channel-chunks", "more channels than a CUDA block's shared memory holds at a time",
             100, 40, 6, 6, padding=1, batch=2),
    ConvCase("bands-overlap", "bands that share rows", 16, 8, 23, 224, padding=1, pool_size=3,
             pool_stride=2, pool_padding=1, batch=2),
]  # fmt: skip
