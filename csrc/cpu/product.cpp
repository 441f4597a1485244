#include "cpu/product.h"

#include <cstring>
#include <numeric>

namespace shallow {
namespace {

constexpr std::int64_t kSumsBytes = 512 << 10;  // of L2 for sums that wait for the next columns

std::int64_t line_up(std::int64_t bytes) { return (bytes + 63) / 64 * 64; }

std::int64_t panel_rows(std::int64_t m) { return std::min<std::int64_t>(m, kPanelRows); }

bool same_order(const TiledMatrix& a, const TiledMatrix& b) {
    if (!a.perm() || !b.perm()) return a.perm() == b.perm();
    return std::equal(a.perm(), a.perm() + a.view().k, b.perm());
}

float element(const void* array, std::int64_t i, ScaleType type) {
    if (type == ScaleType::float32) return static_cast<const float*>(array)[i];
    const std::uint16_t bits = static_cast<const std::uint16_t*>(array)[i];
    return type == ScaleType::float16 ? w4::half_to_float(bits) : w4::bfloat_to_float(bits);
}

// The weight of code `code` in group `group` of a tile's row `lane`, as w4::Matrix gives it.
float value(const TileView& w, std::int64_t tile, std::int64_t group, int lane, int code) {
    const std::uint8_t* const record = w.record(tile, group);
    const auto c = static_cast<float>(code);
    if (w.scheme == w4::Scheme::kquant) {
        const std::uint16_t* const super = w.supers + (tile * ((w.blocks + 7) / 8) + group / 8) * 32;
        const float step = w4::product(w4::half_to_float(super[lane]), record[lane]);
        const float low = w4::product(w4::half_to_float(super[16 + lane]), record[16 + lane]);
        return w4::product(step, c) - low;
    }
    const float scale = element(record, lane, w.scale_type);
    const std::uint8_t* const second = record + 16 * (w.scale_type == ScaleType::float32 ? 4 : 2);
    switch (w.scheme) {
        case w4::Scheme::minimum:
            return w4::product(c, scale) + element(second, lane, w.scale_type);
        case w4::Scheme::zero: return (c - second[lane]) * scale;
        case w4::Scheme::codebook: return w.values[code] * scale;
        default: return (c - w.center) * scale;
    }
}

}  // namespace

int Input::add(const MatrixRef& w) {
    const TileView& v = w->view();
    const bool plain = v.kind == Codes::float32 || v.kind == Codes::float16 ||
                       v.kind == Codes::bfloat16;
    const bool coarse = v.kind == Codes::nibble_table && v.values8_step == 0;
    const Form wanted{w, mode_ == Mode::exact || plain || coarse};
    for (std::size_t i = 0; i < forms_.size(); ++i) {
        const TileView& other = forms_[i].like->view();
        if (forms_[i].exact == wanted.exact && same_order(*forms_[i].like, *w) &&
            (other.kind == Codes::float32) == (v.kind == Codes::float32) &&
            (wanted.exact || other.group_blocks == v.group_blocks))
            return static_cast<int>(i);
    }
    forms_.push_back(wanted);
    return static_cast<int>(forms_.size()) - 1;
}

Path Input::path(const Form& form, std::int64_t m) const {
    const bool wide = form.like->view().kind == Codes::float32;
    if (mode_ == Mode::int8 && m >= kManyRows && kernels_->bfloat_tiles && !wide)
        return Path::bfloat;
    return form.exact ? Path::exact : Path::int8;
}

std::int64_t Input::nbytes(const Form& form, std::int64_t m) const {
    const TileView& w = form.like->view();
    const std::int64_t rows = w4::ceil_div(m, panel_rows(m)) * panel_rows(m);
    const std::int64_t codes = rows * w.blocks * kBlock;
    switch (path(form, m)) {
        case Path::exact: return line_up(codes * 4);
        case Path::bfloat: return rows / kPanelRows * bfloat_stride(w.blocks) * 2;
        default:
            return line_up(2 * codes) + line_up(2 * rows * w.blocks * 4) +
                   line_up(rows * w.groups * 4);
    }
}

Int8Input Input::int8(const Form& form, std::uint8_t* base, std::int64_t m) const {
    const TileView& w = form.like->view();
    const std::int64_t panel = panel_rows(m);
    const std::int64_t plane = w4::ceil_div(m, panel) * panel * w.blocks;
    auto* const scales = base + line_up(2 * plane * kBlock);
    auto* const sums = scales + line_up(2 * plane * 4);
    return {reinterpret_cast<std::int8_t*>(base), reinterpret_cast<float*>(scales),
            reinterpret_cast<float*>(sums), m, panel, plane, fine_};
}

std::int64_t Input::nbytes(std::int64_t m) const {
    std::int64_t bytes = 0;
    for (const Form& form : forms_) bytes += nbytes(form, m);
    return bytes;
}

// Rows i.. of m, the columns from block `block` on; w: the form's view, cut to them.
void Input::convert(const Form& form, const TileView& w, std::uint8_t* to, std::int64_t m,
                    std::int64_t i, std::int64_t block, const Rows& some) const {
    // The kernels write a panel's first rows: here the panel as seen from row i and the block on.
    const TileView& whole = form.like->view();
    const std::int64_t panel = panel_rows(m), lane = i % panel, first = i / panel * panel;
    const std::int64_t at = first * whole.blocks + block * panel;
    switch (path(form, m)) {
        case Path::exact: {
            auto* const values = reinterpret_cast<float*>(to) + at * kBlock + lane;
            return kernels_->widen(some, w, {values, m, panel}, 0);
        }
        case Path::bfloat: {
            auto* const values = reinterpret_cast<std::uint16_t*>(to);
            const std::int64_t width = bfloat_stride(whole.blocks);
            return kernels_->narrow(some, w, {values + first / kPanelRows * width, m, width}, 0);
        }
        case Path::int8: {
            const std::int64_t group = w.group_blocks ? block / w.group_blocks : 2 * block;
            Int8Input part = int8(form, to, m);
            part.q += (at + lane) * kBlock;
            part.scales += at + lane;
            part.sums += first * whole.groups + group * panel + lane;
            return kernels_->quantise(some, w, part, 0);
        }
    }
}

void Input::write(std::uint8_t* to, std::int64_t m, std::int64_t i, const float* rows,
                  std::int64_t stride, std::int64_t count, float* spare) const {
    for (const Form& form : forms_) {
        const TileView& w = form.like->view();
        Rows some{rows, count, w.k, stride, ScaleType::float32};
        if (const std::int32_t* perm = form.like->perm()) {
            for (std::int64_t r = 0; r < count; ++r)
                for (std::int64_t j = 0; j < w.k; ++j) spare[r * w.k + j] = rows[r * stride + perm[j]];
            some.data = spare;
            some.stride = w.k;
        }
        convert(form, w, to, m, i, 0, some);
        to += nbytes(form, m);
    }
}

std::int64_t Input::grain() const {
    std::int64_t blocks = 1;
    for (const Form& form : forms_) {
        if (form.like->perm()) return 0;
        if (form.exact) continue;
        blocks = std::lcm(blocks, std::max<std::int64_t>(form.like->view().group_blocks, 1));
    }
    return blocks * kBlock;
}

void Input::write_columns(std::uint8_t* to, std::int64_t m, std::int64_t i, const float* rows,
                          std::int64_t stride, std::int64_t count, std::int64_t begin,
                          std::int64_t end) const {
    const std::int64_t block = begin / kBlock, panel = panel_rows(m);
    for (const Form& form : forms_) {
        TileView w = form.like->view();
        w.blocks = (end == w.k ? w.blocks : end / kBlock) - block;
        Rows some{rows + begin, 0, end - begin, stride, ScaleType::float32};
        for (std::int64_t row = i; row < i + count; row += some.m) {
            some.data = rows + (row - i) * stride + begin;
            some.m = std::min(panel - row % panel, i + count - row);
            convert(form, w, to, m, row, block, some);
        }
        to += nbytes(form, m);
    }
}

void Product::add(Input& input, const MatrixRef& w, const float* bias, std::int64_t column,
                  bool aside) {
    const auto form = static_cast<std::size_t>(input.add(w));
    parts_.push_back({w, bias, column, aside ? 0 : tiles_, form});
    if (!aside) tiles_ += w->view().tiles;
}

std::int64_t Product::nbytes() const {
    std::int64_t bytes = 0;
    for (const Part& part : parts_) bytes += static_cast<std::int64_t>(part.w->nbytes());
    return bytes;
}

std::int64_t Product::step(const Input& input, std::int64_t m, int threads) const {
    const std::int64_t fair = w4::ceil_div(tiles_, m < kManyRows ? threads : threads * 8);
    if (m < kManyRows || input.path(input.forms_[0], m) != Path::bfloat) return fair;
    const std::int64_t few = std::min(kSumsBytes / (m * kTileRows * 4),
                                      w4::ceil_div(tiles_, threads * 4));
    return std::max<std::int64_t>(few / 2, 1) * 2;
}

std::int64_t Product::scratch_bytes(const Input& input, std::int64_t m, int threads) const {
    if (m < kManyRows) return 0;
    std::int64_t bytes = bfloat_scratch_bytes(m, step(input, m, threads));
    for (const Part& part : parts_) {
        const TileView& w = part.w->view();
        bytes = std::max(bytes, (w.blocks * kBlock + w.groups * 8) * kTileRows);
    }
    return line_up(bytes);
}

void Product::run(const Input& input, std::uint8_t* rows, std::int64_t m, float* y,
                  std::int64_t stride, std::int64_t begin, std::int64_t end,
                  std::uint8_t* scratch) const {
    for (const Part& part : parts_) {
        const TileView& w = part.w->view();
        const std::int64_t first = std::max<std::int64_t>(begin - part.first, 0);
        const std::int64_t last = std::min(end - part.first, w.tiles);
        if (first >= last) continue;
        std::uint8_t* at = rows;
        for (std::size_t f = 0; f < part.form; ++f) at += input.nbytes(input.forms_[f], m);
        const Input::Form& form = input.forms_[part.form];
        const Kernels& kernels = *input.kernels_;
        const Output out{y + part.column, stride, ScaleType::float32, part.bias};
        switch (input.path(form, m)) {
            case Path::exact:
                kernels.float_tiles(w, {reinterpret_cast<float*>(at), m, panel_rows(m)}, out, first,
                                    last);
                break;
            case Path::bfloat:
                kernels.bfloat_tiles(
                    w, {reinterpret_cast<std::uint16_t*>(at), m, bfloat_stride(w.blocks)}, out,
                    first, last, scratch);
                break;
            case Path::int8:
                kernels.int8_tiles(w, input.int8(form, at, m), out, first, last,
                                   m >= kManyRows ? scratch : nullptr);
        }
    }
}

void read_row(const TiledMatrix& matrix, std::int64_t row, float* out) {
    const TileView& w = matrix.view();
    const std::int64_t tile = row / kTileRows;
    const int lane = static_cast<int>(row % kTileRows);
    const bool byte = w.kind == Codes::byte;
    const bool nibble = w.kind == Codes::nibble || w.kind == Codes::nibble_table;
    float values[16];  // of a group's nibbles
    for (std::int64_t half = 0, known = -1; half * 16 < w.k; ++half) {
        const std::int64_t block = half / 2, first = half % 2 * 16;
        const std::int64_t group = w.group_blocks ? block / w.group_blocks : half;
        const std::uint8_t* const codes = w.block(tile, block);
        if (nibble && group != known)
            for (int code = 0; code < 16; ++code) values[code] = value(w, tile, group, lane, code);
        known = group;
        const std::int64_t columns = std::min<std::int64_t>(16, w.k - half * 16);
        for (std::int64_t i = 0; i < columns; ++i) {
            const std::int64_t column = first + i, k = half * 16 + i;
            float v;
            if (nibble) {
                const int pair = codes[i / 4 * 64 + lane * 4 + i % 4];
                v = values[first ? pair >> 4 : pair & 15];
            } else if (byte) {
                v = value(w, tile, group, lane, codes[column / 4 * 64 + lane * 4 + column % 4]);
            } else if (w.kind == Codes::bfloat16) {
                v = element(codes, (column / 2 * kTileRows + lane) * 2 + column % 2,
                            ScaleType::bfloat16);
            } else {
                v = element(codes, column * kTileRows + lane, w.kind == Codes::float32
                                                                  ? ScaleType::float32
                                                                  : ScaleType::float16);
            }
            out[matrix.perm() ? matrix.perm()[k] : k] = v;
        }
    }
}

}  // namespace shallow
