// A stream (csrc/cpu/w4_stream.h) from every block of a tile on, as assertions; test_matmul_plan.py
// compiles and runs it.
#undef NDEBUG
#include "cpu/w4_matmul_generic.cpp"

#include <cassert>
#include <vector>

using namespace shallow;

namespace {

struct Kind {
    std::int64_t group_blocks;  // 0: groups of 16; -1: the whole row
    w4::Scheme scheme;
    ScaleType type;
};

// A matrix of two tiles, the scale of each group that group's number.
struct Numbered {
    TileView view{};
    std::vector<std::uint8_t> bytes;

    Numbered(std::int64_t blocks, const Kind& kind) {
        view.kind = Codes::nibble;
        view.scheme = kind.scheme;
        view.scale_type = kind.type;
        view.center = 8;
        view.tiles = 2;
        view.blocks = blocks;
        view.n = 2 * kTileRows;
        view.k = blocks * kBlock;
        view.group_blocks = kind.group_blocks < 0 ? blocks : kind.group_blocks;
        view.groups = view.group_blocks ? w4::ceil_div(blocks, view.group_blocks) : 2 * blocks;
        view.block_bytes = kBlockBytes<Codes::nibble>;
        const std::int64_t size = element_bytes(kind.type);
        view.record_bytes = kTileRows * size;
        if (kind.scheme == w4::Scheme::zero) view.record_bytes += kTileRows;
        if (kind.scheme == w4::Scheme::minimum) view.record_bytes += kTileRows * size;
        view.set_runs();
        bytes.resize(static_cast<std::size_t>(view.tiles * view.tile_bytes));
        view.data = bytes.data();
        for (std::int64_t tile = 0; tile < view.tiles; ++tile)
            for (std::int64_t group = 0; group < view.groups; ++group)
                for (std::int64_t lane = 0; lane < kTileRows; ++lane)
                    Generic::store(
                        const_cast<std::uint8_t*>(view.record(tile, group)) + lane * size,
                        kind.type, Generic::set(static_cast<float>(group)), 1);
    }
};

void walk(const TileView& w, std::int64_t tile, std::int64_t first) {
    Stream<Generic, Codes::nibble> stream(w, tile, first);
    Floats scale[kParts<Generic>], min[kParts<Generic>];
    for (std::int64_t b = first; b < w.blocks; ++b) {
        for (int half = 0; half < (w.group_blocks ? 1 : 2); ++half) {
            const std::int64_t group = w.group_blocks ? b / w.group_blocks : 2 * b + half;
            if (w.group_blocks && b > first && b % w.group_blocks) continue;
            stream.next(scale, min);
            for (const Floats& part : scale)
                for (int i = 0; i < Generic::lanes; ++i)
                    assert(part[i] == static_cast<float>(group));
        }
        assert(stream.block() == w.block(tile, b));
    }
}

}  // namespace

int main() {
    using w4::Scheme;
    for (const std::int64_t group_blocks : {-1, 0, 1, 2, 4})
        for (const Scheme scheme : {Scheme::symmetric, Scheme::zero, Scheme::minimum})
            for (const ScaleType type : {ScaleType::float16, ScaleType::float32})
                for (const std::int64_t blocks : {1, 2, 5, 35, 64}) {
                    const Numbered matrix(blocks, {group_blocks, scheme, type});
                    for (std::int64_t first = 0; first < blocks; ++first)
                        for (std::int64_t tile = 0; tile < 2; ++tile)
                            walk(matrix.view, tile, first);
                }
}
