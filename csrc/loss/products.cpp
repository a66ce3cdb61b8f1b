// On the CPU a product is cut into tiles at places that depend on its shape alone, and each tile is one call of
// aten::mm on one thread, which the library behind it must not leave. Left to itself, MKL divides a long inner
// dimension among the threads that it may use, and with it the order of the sum; within a parallel region it still
// divides by the number that it was given. oneDNN, which multiplies 16-bit numbers, is held to one thread as well.
#include "products.h"

#include <algorithm>
#include <array>
#include <vector>

// Found when this library is loaded; null where torch comes without MKL or OpenMP.
extern "C" {
__attribute__((weak)) int MKL_Set_Num_Threads_Local(int threads);
__attribute__((weak)) void omp_set_num_threads(int threads);
}

namespace facefast {
namespace {

// A product of 2, 8, 32, ... times as many multiplications is cut into 2, 4, 8, ... tiles: smaller ones are easier to
// share out, and cost more calls. oneDNN multiplies 16-bit numbers several times as fast as MKL does wider ones, and
// takes several times as long to begin.
constexpr int64_t kDoubleUnit = 1 << 20, kFloatUnit = 2 << 20, kHalfUnit = 8 << 20;
constexpr int64_t kSmallest = 128;  // rows or columns of a tile that are not cut any more
constexpr int64_t kStep = 16;       // numbers in a vector register

// As long as this lives, the libraries behind aten::mm use the calling thread alone.
class OneThread {
 public:
  // Asking torch comes first: a thread's first question makes torch set both numbers itself.
  OneThread() : threads_(static_cast<int>(torch::stable::get_num_threads())) {
    if (omp_set_num_threads != nullptr) omp_set_num_threads(1);
    if (MKL_Set_Num_Threads_Local != nullptr) mkl_threads_ = MKL_Set_Num_Threads_Local(1);
  }
  ~OneThread() {
    if (MKL_Set_Num_Threads_Local != nullptr) MKL_Set_Num_Threads_Local(mkl_threads_);
    if (omp_set_num_threads != nullptr) omp_set_num_threads(threads_);
  }
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;

 private:
  int threads_, mkl_threads_ = 0;
};

void mm(const Tensor& a, const Tensor& b, const Tensor& out) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // the operator's return value, to be released
}

// A block of the last two dimensions of a tensor, and of its place `part` of the first of three. It knows no autograd,
// which is switched off for the thread that called the operator and for no other.
Tensor block(const Tensor& t, int64_t part, int64_t row, int64_t rows, int64_t column, int64_t columns) {
  const int64_t first = t.dim() - 2, down = t.stride(first), across = t.stride(first + 1);
  const int64_t offset = (first > 0 ? part * t.stride(0) : 0) + row * down + column * across;
  return torch::stable::from_blob(static_cast<char*>(t.data_ptr()) + offset * static_cast<int64_t>(t.element_size()),
                                  {rows, columns}, {down, across}, t.device(), t.scalar_type());
}

// The tiles of a product, in a fixed order.
struct Tiles {
  const Product& product;
  const int64_t rows, inner, columns, parts, down, across;

  explicit Tiles(const Product& p)
      : product(p),
        rows(p.a.size(0)),
        inner(p.a.size(1)),
        columns(p.b.size(1)),
        parts(std::max<int64_t>(1, divide_up(inner, p.tile.inner))),
        down(divide_up(rows, p.tile.rows)),
        across(divide_up(columns, p.tile.columns)) {}

  int64_t count() const { return parts * down * across; }

  void multiply(int64_t i) const {
    const Tile& tile = product.tile;
    const int64_t part = i / (down * across), row = i / across % down * tile.rows, column = i % across * tile.columns;
    const int64_t first = part * tile.inner, depth = std::min(tile.inner, inner - first);
    const int64_t tall = std::min(tile.rows, rows - row), wide = std::min(tile.columns, columns - column);
    mm(block(product.a, 0, row, tall, first, depth), block(product.b, 0, first, depth, column, wide),
       block(product.out, part, row, tall, column, wide));
  }
};

}  // namespace

Tile tile_for(const Tensor& like, int64_t rows, int64_t inner, int64_t columns, bool in_parts) {
  Tile tile{std::max<int64_t>(1, rows), std::max<int64_t>(1, inner), std::max<int64_t>(1, columns)};
  if (like.is_cuda()) return tile;
  const int64_t size = static_cast<int64_t>(like.element_size());
  const int64_t unit = size == 8 ? kDoubleUnit : size == 4 ? kFloatUnit : kHalfUnit;
  const int64_t units = rows * columns * inner / unit;
  const auto halve = [](int64_t& length) { length = divide_up(divide_up(length, 2), kStep) * kStep; };
  for (int64_t count = 1, parts = 1; 2 * count * count <= units; count *= 2) {
    const bool may_part = in_parts && 2 * parts * columns <= inner;
    // Parts have to be added up afterwards: they are the last choice among equals.
    const int64_t part = may_part ? tile.inner / 2 : 0, longest = std::max({tile.rows, tile.columns, part});
    if (longest <= kSmallest) break;
    if (tile.rows == longest) {
      halve(tile.rows);
    } else if (tile.columns == longest) {
      halve(tile.columns);
    } else {
      halve(tile.inner);
      parts *= 2;
    }
  }
  return tile;
}

Product whole_product(const Tensor& a, const Tensor& b, const Tensor& out) {
  return {a, b, out, tile_for(a, a.size(0), a.size(1), b.size(1))};
}

void multiply(std::initializer_list<std::optional<Product>> products) {
  std::vector<Tiles> wanted;
  for (const std::optional<Product>& product : products) {
    if (!product) continue;
    if (product->a.is_cuda()) {
      mm(product->a, product->b, product->out.dim() == 2 ? product->out : torch::stable::select(product->out, 0, 0));
    } else {
      wanted.emplace_back(*product);
    }
  }
  // A thread takes neighbours: a share of every product, for one may write fresh memory and another not.
  struct Job {
    const Tiles* tiles;
    int64_t number;
    double place;
  };
  std::vector<Job> jobs;
  for (const Tiles& tiles : wanted) {
    for (int64_t i = 0; i < tiles.count(); ++i) jobs.push_back({&tiles, i, double(i) / double(tiles.count())});
  }
  std::ranges::stable_sort(jobs, {}, &Job::place);
  torch::stable::parallel_for(0, static_cast<int64_t>(jobs.size()), 1, [&](int64_t begin, int64_t end) {
    const OneThread alone;
    for (int64_t i = begin; i < end; ++i) jobs[i].tiles->multiply(jobs[i].number);
  });
}

}  // namespace facefast
