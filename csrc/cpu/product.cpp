#include "cpu/product.h"

#include <algorithm>
#include <numeric>

namespace shallow {
namespace {

bool same_order(const TiledMatrix& a, const TiledMatrix& b) {
    if (!a.perm() || !b.perm()) return a.perm() == b.perm();
    return std::equal(a.perm(), a.perm() + a.view().k, b.perm());
}

}  // namespace

Rows FloatRows::part(std::int64_t i, std::int64_t count, std::int64_t begin,
                     std::int64_t end) const {
    Rows x;
    x.data = row(i) + begin;
    x.m = count;
    x.k = end - begin;
    x.stride = stride;
    x.type = ScaleType::float32;
    return x;
}

Path Input::path_of_few(const TiledMatrix& w) const {
    return choose_path(w.view(), 1, mode_, kernels_);
}

std::size_t Input::add(const std::shared_ptr<const TiledMatrix>& w) {
    const TileView& v = w->view();
    const auto agrees = [&](const std::shared_ptr<const TiledMatrix>& like) {
        const TileView& other = like->view();
        return path_of_few(*like) == path_of_few(*w) && same_order(*like, *w) &&
               (other.kind == Codes::float32) == (v.kind == Codes::float32) &&
               (path_of_few(*w) == Path::exact || other.group_blocks == v.group_blocks);
    };
    const auto found = std::find_if(like_.begin(), like_.end(), agrees);
    if (found != like_.end()) return static_cast<std::size_t>(found - like_.begin());
    like_.push_back(w);
    if (w->perm()) grain_ = 0;
    if (path_of_few(*w) != Path::exact)
        grain_ = std::lcm(grain_, std::max<std::int64_t>(v.group_blocks, 1) * kBlock);
    return like_.size() - 1;
}

Form Input::form(std::size_t index, std::int64_t m) const {
    const TileView& like = like_[index]->view();
    return Form(like, choose_path(like, m, mode_, kernels_), m, fine_);
}

std::int64_t Input::nbytes(std::int64_t m) const {
    std::int64_t bytes = 0;
    for (std::size_t i = 0; i < like_.size(); ++i) bytes += form(i, m).nbytes();
    return bytes + (bounded(m) ? bounds(m).nbytes() : 0);
}

void Input::write(const Rows& x, std::uint8_t* forms, std::int64_t m, std::int64_t row,
                  float* spare) const {
    for (std::size_t i = 0; i < like_.size(); ++i) {
        const Form to = form(i, m);
        const std::int32_t* const perm = like_[i]->perm();
        to.write(kernels_, perm ? gather(x, perm, spare) : x, forms, row, 0);
        forms += to.nbytes();
    }
    if (!bounded(m)) return;
    const std::int32_t* const perm = like_[0]->perm();
    bounds(m).write(kernels_, perm ? gather(x, perm, spare) : x, forms, row, 0);
}

void Input::write_columns(const Rows& x, std::uint8_t* forms, std::int64_t m, std::int64_t row,
                          std::int64_t column) const {
    for (std::size_t i = 0; i < like_.size(); ++i) {
        const Form to = form(i, m);
        Rows some = x;  // of one panel
        for (std::int64_t done = 0; done < x.m; done += some.m) {
            some.data = static_cast<const float*>(x.data) + done * x.stride;
            some.m = std::min(to.panel - (row + done) % to.panel, x.m - done);
            to.write(kernels_, some, forms, row + done, column);
        }
        forms += to.nbytes();
    }
}

void Product::add(const std::shared_ptr<const TiledMatrix>& w, const float* bias,
                  std::int64_t column, bool aside) {
    Entry part;
    part.w = w;
    part.bias = bias;
    part.column = column;
    part.first = aside ? 0 : tiles_;
    part.form = input_->add(w);
    entries_.push_back(part);
    nbytes_ += static_cast<std::int64_t>(w->nbytes());
    if (!aside) tiles_ += w->view().tiles;
}

// A part in bfloat decides: its scratch holds one claim, that of the others any.
std::int64_t Product::claim(std::int64_t m, int threads) const {
    std::int64_t claim = 0;
    for (const Entry& part : entries_)
        claim = std::max(claim, input_->form(part.form, m).claim(tiles_, threads));
    return claim;
}

std::int64_t Product::scratch_bytes(std::int64_t m, int threads) const {
    if (m == 1) return 0;  // of every path
    std::int64_t bytes = 0;
    for (const Entry& part : entries_)
        bytes = std::max(
            bytes, input_->form(part.form, m).scratch_bytes(part.w->view(), claim(m, threads)));
    return bytes;
}

void Product::run(std::uint8_t* forms, std::int64_t m, const FloatRows& y, std::int64_t begin,
                  std::int64_t end, std::uint8_t* scratch) const {
    for (const Entry& part : entries_) {
        const TileView& w = part.w->view();
        const std::int64_t first = std::max<std::int64_t>(begin - part.first, 0);
        const std::int64_t last = std::min(end - part.first, w.tiles);
        if (first >= last) continue;
        std::uint8_t* at = forms;
        for (std::size_t i = 0; i < part.form; ++i) at += input_->form(i, m).nbytes();
        Output out;
        out.data = y.data + part.column;
        out.stride = y.stride;
        out.type = ScaleType::float32;
        out.bias = part.bias;
        input_->form(part.form, m).multiply(input_->kernels(), w, at, out, first, last, scratch);
    }
}

void Product::add_bounds() {
    if (entries_.size() == 1 && !entries_[0].bias) input_->add_bounds();
}

void Product::bound(std::uint8_t* forms, std::int64_t m, const FloatRows& tops, std::int64_t begin,
                    std::int64_t end) const {
    Output out{};
    out.data = tops.data;
    out.stride = tops.stride;
    out.type = ScaleType::float32;
    input_->bounds(m).multiply(input_->kernels(), entries_[0].w->view(),
                               forms + input_->form(0, m).nbytes(), out, begin, end, nullptr);
}

void Product::run_row(std::uint8_t* forms, std::int64_t m, std::int64_t row, const FloatRows& y,
                      std::int64_t tile) const {
    Output out{};
    out.data = y.row(row);
    out.stride = y.stride;
    out.type = ScaleType::float32;
    input_->form(0, m).multiply_row(input_->kernels(), entries_[0].w->view(), forms, row, out, tile,
                                    tile + 1);
}

void Product::fetch(std::int64_t tile) const {
    const TileView& w = entries_[0].w->view();
    const std::uint8_t* const bytes = w.data + tile * w.tile_bytes;
    for (std::int64_t at = 0; at < w.tile_bytes; at += 64) __builtin_prefetch(bytes + at, 0, 2);
}

}  // namespace shallow
