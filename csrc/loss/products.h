// Matrix products whose results do not depend on the number of threads, for linear_focal.cpp.
#pragma once

#include <initializer_list>
#include <optional>

#include "tensors.h"

namespace facefast {

constexpr int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// What one call of aten::mm multiplies: the sizes of a block of the result, and a part of the inner dimension.
struct Tile {
  int64_t rows, inner, columns;
};

// The tile of a [rows, inner] x [inner, columns] product, by its shape and type alone; on a GPU it is the whole
// product. Only `in_parts` cuts the inner dimension, into parts that have together no more numbers than [rows, inner].
Tile tile_for(const Tensor& like, int64_t rows, int64_t inner, int64_t columns, bool in_parts = false);

// out[i] = a[:, part i] @ b[part i, :], for the parts that the tile cuts; out is [parts, rows, columns], or [rows,
// columns] where there is one part.
struct Product {
  Tensor a, b, out;
  Tile tile;
};

// out = a @ b
Product whole_product(const Tensor& a, const Tensor& b, const Tensor& out);

// All of them at a time.
void multiply(std::initializer_list<std::optional<Product>> products);

}  // namespace facefast
