#include "experts.h"

#include <algorithm>
#include <cinttypes>

#include "buffer.h"
#include "message.h"

namespace blockpress {
namespace {

// The matrix of one expert. The offsets count from the first value of all.
Weight ExpertWeight(const Weight& all, int64_t expert, int64_t rows) {
  const int64_t first = expert * rows;
  Weight weight = all;
  weight.rows = rows;
  weight.mask += first * all.mask_row_bytes();
  weight.offsets += first / kStripRows;
  weight.scales = all.row_scales(first);
  if (all.bias_per_row) weight.bias += first;
  return weight;
}

bool CheckExpertNumbers(const int64_t* experts, int64_t rows, int64_t count, Message* message) {
  for (int64_t row = 0; row < rows; ++row) {
    if (experts[row] >= 0 && experts[row] < count) continue;
    if (count == 0) return message->Set("there are rows of x, but no experts");
    return message->Set("experts[%" PRId64 "] must be from 0 to %" PRId64 ", but is %" PRId64, row, count - 1,
                        experts[row]);
  }
  return true;
}

// Puts the rows in the order of their experts: those of expert e, in x's order, are those from starts[e] on.
void SortRows(const int64_t* experts, int64_t rows, int64_t count, int64_t* starts, int64_t* order) {
  std::fill_n(starts, count + 1, int64_t{0});
  for (int64_t row = 0; row < rows; ++row) ++starts[experts[row]];
  for (int64_t expert = 0; expert < count; ++expert) starts[expert + 1] += starts[expert];
  for (int64_t row = rows - 1; row >= 0; --row) order[--starts[experts[row]]] = row;
}

} // namespace

ort::Status* MultiplyExperts(const Kernels& kernels, const ExpertProducts& products, Host* host) {
  const int64_t rows = products.rows, width = products.expert_rows, count = products.weight.rows / width;
  Message message;
  if (!CheckExpertNumbers(products.experts, rows, count, &message)) {
    return host->Fail(ort::kInvalidArgument, message.text());
  }
  if (rows == 0) return nullptr;
  Buffer numbers, memory, unordered;
  auto* const starts = numbers.Allocate<int64_t>(count + 1 + rows);
  auto* const of = memory.Allocate<Product>(std::min(count, rows));
  if (starts == nullptr || of == nullptr) return host->Fail(ort::kFail, "out of memory for the order of the rows of x");
  int64_t* const order = starts + count + 1;
  SortRows(products.experts, rows, count, starts, order);

  float* y = nullptr; // of the rows that the kernels cannot write to their place
  int64_t active = 0;
  for (int64_t expert = 0; expert < count; ++expert) {
    const int64_t first = starts[expert], last = starts[expert + 1] - 1;
    if (first > last) continue;
    Product& product = of[active++];
    product = {ExpertWeight(products.weight, expert, width), first, last - first + 1, nullptr, nullptr};
    if (order[last] - order[first] == last - first) { // they lie beside each other
      product.y = products.y + order[first] * width;
      continue;
    }
    if (y == nullptr) y = unordered.AllocateRows<float>(rows, width);
    if (y == nullptr) return host->Fail(ort::kFail, "out of memory for the rows of y");
    product.y = y + first * width;
    product.ordered = products.y;
  }
  const bool in_order = std::is_sorted(order, order + rows);
  return Multiply(kernels, {products.x, rows, products.weight.columns, products.rounded, in_order ? nullptr : order, of,
                            active}, host);
}

} // namespace blockpress
