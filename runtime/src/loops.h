// Y = X Wᵀ over strips of packed rows, written once for every vector instruction set.
//
// An instruction set `Isa` gives (see avx2.cpp, avx512.cpp, neon.cpp):
//   Floats, kFloats        a vector of float32 and how many it holds; its arithmetic: Zero, Fill, Load, Store, Plus, Minus,
//                          Times, Over, Fma(a, b, c) = a b + c, Sum, AddSums, LargerSize, StoreRounded (to int8)
//   Bytes, kBytes          a vector of int8 and how many it holds; kPieceVectors of them are a piece
//   Dots<type, Rows>       exact int32 sums of products of int8: one row of W with Rows rows of X
//   Cursor<type>           walks the values of some rows, one or two pieces of 64 columns (eight bytes of its mask each) at
//                          a time, with memory of the type Scratch<type> and one object of the type Constants for all
//   ArrangePiece(x)        puts a piece of a row of X as int8 in the order in which the cursor gives columns as int8
//   EachDenseBytes(p, use) calls use(j, vector j in that order) for the piece of int8 at p
//   StoreBytes, FromBytes  a vector of int8 to memory; kFloats int8 in memory as float32
//   Tally                  the sum of vectors of int8
//   kAdded                 what TileDots adds to X as int8, so that it has no sign
//   TileDots<Rows>         adds to y the dot products of kTileWeights rows of a tile with Rows rows of X as int8 + kAdded,
//                          less what that adds to them, times their scales
//   kPairsSaturate         whether two weights of a tile beside each other may be too large for TileDots; then
//                          Tally::TakeLarge tells whether there were such since the last call, and
//                          EachLargePair(weights, body) calls body(k) where those of columns k and k + 1 of a piece are
//   PlusEight              a vector of int4 weights as bytes without a sign
//   Inputs(x)              64 columns of a row of X as int8; TimesInt4(weights) gives its exact dot product with those
//                          weights plus eight, over the lanes, and takes off again what the eights add
//   kFloatRows, kByteRows  rows of X that one step of the many-row product takes, as float32 and as int8
//   Fetch(p)               asks the memory for the line at p
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "target.h"
#include "weight.h"

namespace blockpress {

// Up to this many rows of X each weight is expanded in registers for every one of them; beyond, a tile of weights is
// expanded once into the cache.
constexpr int64_t kFewRows = 4;
template <class Element> constexpr int64_t kTileColumns = 4096 / static_cast<int64_t>(sizeof(Element));
// From one row of a tile to the next: at 4096 bytes, all rows would want the same places of the cache.
template <class Element>
constexpr int64_t kTileStride = kTileColumns<Element> + 192 / static_cast<int64_t>(sizeof(Element));
constexpr int64_t kTileInputs = 30; // rows of X that meet a tile in turn: whole steps of every instruction set
constexpr int64_t kMostInputs = 512; // rows of X that one walk over W serves
constexpr int64_t kTilePieces = kTileColumns<int8_t> / kPieceColumns; // of a row of a tile of int8
constexpr int64_t kTileWeights = 4; // rows of W that one step of the many-row product takes

// The values come in one stream, the mask in another. Processors fetch ahead within a page only, so the kernels ask for
// the values this many bytes ahead, in the next pages too, and for the mask of the next row; what lies behind the end is
// never read.
constexpr int64_t kValuesAhead = 2048;

template <class Isa, ValueType type> inline void FetchValues(const uint8_t* values) {
  Isa::Fetch(values + kValuesAhead);
  for (int64_t line = 1; line < ElementBytes(type); line += 2) // a piece has up to 64 values
    Isa::Fetch(values + kValuesAhead + 64 * line);
}

template <class Isa> inline void FetchNextMask(const Weight& weight, int64_t row) {
  const uint8_t* next = weight.mask + (row + 1) * weight.mask_stride;
  for (int64_t byte = 0; byte < weight.mask_row_bytes(); byte += 64) Isa::Fetch(next + byte);
}

// Calls body(scale, first piece, last piece) for each group of a row among these pieces.
template <class Body>
inline void EachGroup(const Weight& weight, const float* scales, int64_t first_piece, int64_t last_piece, Body body) {
  const int64_t group_pieces = weight.group_size / kPieceColumns;
  int64_t group = first_piece / group_pieces;
  int64_t end = (group + 1) * group_pieces;
  for (int64_t piece = first_piece; piece < last_piece; piece = end, end += group_pieces)
    body(scales[group++], piece, std::min(end, last_piece));
}

// One row of W, whose values the cursor walks, times the rows of X as float32: their outputs from y on.
template <class Isa, int Rows, class Cursor>
BLOCKPRESS_INLINE void RowTimesFloats(const Weight& weight, int64_t row, Cursor* cursor, const Activations& x,
                                      float* y) {
  using Floats = typename Isa::Floats;
  constexpr int kSums = Rows == 1 ? 4 : Rows == 2 ? 2 : 1; // enough independent sums to hide the latency of Fma
  const float* const inputs = x.x;
  const int64_t stride = x.stride;
  const MaskRow mask(weight, row);
  FetchNextMask<Isa>(weight, row);
  Floats total[Rows];
  for (int i = 0; i < Rows; ++i) total[i] = Isa::Zero();
  EachGroup(weight, weight.row_scales(row), 0, weight.pieces(),
            [&](float scale, int64_t first, int64_t last) {
              Floats sums[Rows][kSums];
              for (auto& of_row : sums)
                for (auto& sum : of_row) sum = Isa::Zero();
              const auto add_piece = [&](int64_t piece, const uint8_t* bits) {
                const float* columns = inputs + piece * kPieceColumns;
                cursor->EachFloats(bits, [&](int j, Floats w) {
                  for (int i = 0; i < Rows; ++i)
                    sums[i][j % kSums] =
                        Isa::Fma(w, Isa::Load(columns + i * stride + j * Isa::kFloats), sums[i][j % kSums]);
                });
              };
              const int64_t whole = std::min(last, mask.whole_pieces());
              for (int64_t piece = first; piece < whole; ++piece) add_piece(piece, mask.whole_piece(piece));
              if (whole < last) add_piece(whole, mask.piece(whole));
              for (int i = 0; i < Rows; ++i) {
                Floats sum = sums[i][0];
                for (int k = 1; k < kSums; ++k) sum = Isa::Plus(sum, sums[i][k]);
                total[i] = Isa::Fma(sum, Isa::Fill(scale), total[i]);
              }
            });
  for (int i = 0; i < Rows; ++i) y[i * weight.rows] = Isa::Sum(total[i]) + weight.row_bias(row);
}

// Calls use(piece, j, vector j of its columns as int8) for the pieces from first to last, and end(piece) after each.
template <class Isa, class Cursor, class Use, class End>
BLOCKPRESS_INLINE void EachPiece(const MaskRow& mask, int64_t first, int64_t last, Cursor* cursor, Use use, End end) {
  using Bytes = typename Isa::Bytes;
  const int64_t whole = std::min(last, mask.whole_pieces());
  int64_t piece = first;
  for (; piece + 2 <= whole; piece += 2) {
    cursor->EachBytesOfTwo(mask.whole_piece(piece), [&](int k, int j, Bytes w) {
      use(piece + k, j, w);
      if (j == Isa::kPieceVectors - 1) end(piece + k);
    });
  }
  for (; piece < last; ++piece) {
    cursor->EachBytes(mask.piece(piece), [&](int j, Bytes w) { use(piece, j, w); });
    end(piece);
  }
}

// One row of W, whose values the cursor walks, times the rows of X as int8: their outputs from y on.
template <class Isa, ValueType type, int Rows, class Cursor>
BLOCKPRESS_INLINE void RowTimesBytes(const Weight& weight, int64_t row, Cursor* cursor, const Activations& x,
                                     float* y) {
  using Floats = typename Isa::Floats;
  using Dots = typename Isa::template Dots<type, Rows>;
  const int8_t* const inputs = x.quantized;
  const int64_t stride = x.stride;
  const MaskRow mask(weight, row);
  FetchNextMask<Isa>(weight, row);
  Floats total[Rows];
  for (int i = 0; i < Rows; ++i) total[i] = Isa::Zero();
  const float* scales = weight.row_scales(row);
  Dots dots;
  const auto add = [&](int64_t piece, int j, typename Isa::Bytes w) {
    dots.Add(j, w, inputs + piece * kPieceColumns + j * Isa::kBytes, stride);
  };
  const auto end_group = [&](float scale) {
    for (int i = 0; i < Rows; ++i) total[i] = Isa::Fma(dots.Sums(i), Isa::Fill(scale), total[i]);
    dots.Clear();
  };
  const auto store = [&](int i, float sum) { y[i * weight.rows] = sum * x.scales[i] + weight.row_bias(row); };
  if (weight.group_size >= weight.columns) { // as usual for int8, and worth a path of its own for short rows
    EachPiece<Isa>(mask, 0, weight.pieces(), cursor, add, [](int64_t) {});
    for (int i = 0; i < Rows; ++i) store(i, Isa::Sum(dots.Sums(i)) * *scales);
    return;
  }
  if (weight.group_size == kPieceColumns) { // as usual for int4, and worth a loop of its own
    EachPiece<Isa>(mask, 0, weight.pieces(), cursor, add, [&](int64_t piece) { end_group(scales[piece]); });
  } else {
    EachGroup(weight, scales, 0, weight.pieces(), [&](float scale, int64_t first, int64_t last) {
      EachPiece<Isa>(mask, first, last, cursor, add, [](int64_t) {});
      end_group(scale);
    });
  }
  for (int i = 0; i < Rows; ++i) store(i, Isa::Sum(total[i]));
}

// The product of a dense weight with few rows of X as int8, of one strip.
template <class Isa, int Rows>
BLOCKPRESS_NOINLINE void MultiplyDense(const Weight& weight, const Activations& x, int64_t first_row, int64_t last_row,
                                       float* y) {
  const uint8_t* values = weight.strip_values(first_row / kStripRows);
  for (int64_t row = first_row; row < last_row; ++row, values += weight.columns) {
    typename Isa::template Dots<ValueType::kInt8, Rows> dots;
    for (int64_t k = 0; k < weight.columns; k += kPieceColumns) { // behind the row's end x is 0
      Isa::Fetch(values + k + kValuesAhead);
      Isa::EachDenseBytes(values + k, [&](int j, typename Isa::Bytes w) {
        dots.Add(j, w, x.quantized + k + j * Isa::kBytes, x.stride);
      });
    }
    for (int i = 0; i < Rows; ++i)
      y[i * weight.rows + row] =
          Isa::Sum(dots.Sums(i)) * *weight.row_scales(row) * x.scales[i] + weight.row_bias(row);
  }
}

template <class Isa>
void MultiplyDense(const Weight& weight, const Activations& x, int64_t first_row, int64_t last_row, float* y) {
  for (int64_t first = first_row; first < last_row; first += kStripRows) {
    const int64_t last = std::min(first + kStripRows, last_row);
    switch (x.rows) {
    case 1: MultiplyDense<Isa, 1>(weight, x, first, last, y); break;
    case 2: MultiplyDense<Isa, 2>(weight, x, first, last, y); break;
    case 3: MultiplyDense<Isa, 3>(weight, x, first, last, y); break;
    default: MultiplyDense<Isa, 4>(weight, x, first, last, y);
    }
  }
}

// The product with few rows of X.
template <class Isa, ValueType type, bool quantized, int Rows>
BLOCKPRESS_NOINLINE void MultiplyFew(const Weight& weight, const Activations& x, int64_t first_row, int64_t last_row,
                                     float* y) {
  const typename Isa::Constants constants;
  typename Isa::template Scratch<type> scratch;
  const uint8_t* const values = weight.strip_values(first_row / kStripRows);
  const uint8_t* const end = weight.strip_values((last_row + kStripRows - 1) / kStripRows);
  typename Isa::template Cursor<type> cursor(constants, values, end, &scratch);
  for (int64_t row = first_row; row < last_row; ++row) {
    if constexpr (quantized) RowTimesBytes<Isa, type, Rows>(weight, row, &cursor, x, y + row);
    else RowTimesFloats<Isa, Rows>(weight, row, &cursor, x, y + row);
  }
}

template <class Isa, ValueType type, bool quantized>
void MultiplyFew(const Weight& weight, const Activations& x, int64_t first_row, int64_t last_row, float* y) {
  switch (x.rows) {
  case 1: return MultiplyFew<Isa, type, quantized, 1>(weight, x, first_row, last_row, y);
  case 2: return MultiplyFew<Isa, type, quantized, 2>(weight, x, first_row, last_row, y);
  case 3: return MultiplyFew<Isa, type, quantized, 3>(weight, x, first_row, last_row, y);
  default: return MultiplyFew<Isa, type, quantized, 4>(weight, x, first_row, last_row, y);
  }
}

// The many-row product of one strip works on tiles: kStripRows rows of W, expanded over up to kTileColumns columns;
// kTileWeights of them at a time stay in the nearest cache and meet every row of X.
// `tile` holds float32 times the scales, so that the products need none.
template <class Isa, int Rows>
BLOCKPRESS_NOINLINE void TileTimesFloats(const float* tile, int64_t columns, const float* x, int64_t stride, float* y,
                                         int64_t stride_y) {
  using Floats = typename Isa::Floats;
  Floats sums[kTileWeights][Rows];
  for (auto& of_row : sums)
    for (auto& sum : of_row) sum = Isa::Zero();
  for (int64_t k = 0; k < columns; k += Isa::kFloats) {
    Floats xs[Rows];
    for (int i = 0; i < Rows; ++i) xs[i] = Isa::Load(x + i * stride + k);
    for (int r = 0; r < kTileWeights; ++r) {
      const Floats w = Isa::Load(tile + r * kTileStride<float> + k);
      for (int i = 0; i < Rows; ++i) sums[r][i] = Isa::Fma(w, xs[i], sums[r][i]);
    }
  }
  for (int i = 0; i < Rows; ++i) Isa::AddSums(sums[0][i], sums[1][i], sums[2][i], sums[3][i], y + i * stride_y);
}

// What holds for each row of a strip, one after the other, in a group or piece of a tile.
template <class T> using OfRows = T[kStripRows];

// The same over int8, for the columns of W from `first` on. `scales` and `added` (what kAdded adds to the sums) are those
// of the tile's groups, from the first of the kTileWeights rows on.
template <class Isa, int Rows>
BLOCKPRESS_NOINLINE void TileTimesInt8(const int8_t* tile, const float* scales, const int32_t* added,
                                       int64_t group_size, int64_t first, int64_t columns, const int8_t* x,
                                       int64_t stride, float* y, int64_t stride_y) {
  int64_t end = (first / group_size + 1) * group_size - first;
  for (int64_t k = 0; k < columns; k = end, end += group_size, scales += kStripRows, added += kStripRows)
    Isa::template TileDots<Rows>(tile + k, std::min(end, columns) - k, x + k, stride, scales, added, y, stride_y);
}

// The same over int4 plus eight, with the scales of the tile's pieces.
template <class Isa, int Rows>
BLOCKPRESS_NOINLINE void TileTimesInt4(const int8_t* tile, const float* scales, int64_t pieces, const int8_t* x,
                                       int64_t stride, float* y, int64_t stride_y) {
  using Floats = typename Isa::Floats;
  Floats sums[kTileWeights][Rows];
  for (auto& of_row : sums)
    for (auto& sum : of_row) sum = Isa::Zero();
  for (; pieces > 0; --pieces, tile += kPieceColumns, x += kPieceColumns, scales += kStripRows) {
    typename Isa::Inputs inputs[Rows];
    for (int i = 0; i < Rows; ++i) inputs[i] = typename Isa::Inputs(x + i * stride);
    for (int r = 0; r < kTileWeights; ++r) {
      const Floats scale = Isa::Fill(scales[r]);
      for (int i = 0; i < Rows; ++i)
        sums[r][i] = Isa::Fma(inputs[i].TimesInt4(tile + r * kTileStride<int8_t>), scale, sums[r][i]);
    }
  }
  for (int i = 0; i < Rows; ++i) Isa::AddSums(sums[0][i], sums[1][i], sums[2][i], sums[3][i], y + i * stride_y);
}

// Calls body(constant number of rows, row) for the rows from first to last, `most` at a time.
template <int most, class Body> inline void EachTileRows(int64_t first, int64_t last, Body body) {
  int64_t row = first;
  for (; row + most <= last; row += most) body(std::integral_constant<int, most>(), row);
  for (; row < last; ++row) body(std::integral_constant<int, 1>(), row);
}

// Whether some products of a tile are made apart, of X transposed.
template <class Isa, ValueType type> constexpr bool DefersPairs(bool quantized) {
  return Isa::kPairsSaturate && quantized && type == ValueType::kInt8; // those of int4 are small
}

// A strip of W on its way through the columns, for up to kMostInputs rows of X.
template <class Isa, ValueType type, bool quantized> class Strip {
  using Element = std::conditional_t<quantized, int8_t, float>;
  using Cursor = typename Isa::template Cursor<type>;
  static constexpr int64_t kColumns = kTileColumns<Element>;
  static constexpr int kStepInputs = quantized ? Isa::kByteRows : Isa::kFloatRows;
  static constexpr bool kInt4 = quantized && type == ValueType::kInt4;
  static constexpr bool kDefers = DefersPairs<Isa, type>(quantized);

public:
  Strip(const Weight& weight, int64_t first_row, int64_t rows, const Activations& x, float* y)
      : weight_(weight), first_row_(first_row), rows_(rows), x_(x), y_(y) {
    const uint8_t* values = weight.strip_values(first_row / kStripRows);
    for (int64_t r = 0; r < rows; ++r) {
      starts_[r] = values;
      values += Cursor::RowBytes(MaskRow(weight, first_row + r), weight.pieces());
      ends_[r] = values;
    }
    for (int64_t r = rows; r < kStripRows; ++r) { // rows of W beyond the last
      std::fill_n(tile_ + r * kTileStride<Element>, kColumns, Element{0});
      for (int64_t i = 0; i < kTilePieces; ++i) scales_[i][r] = 0, added_[i][r] = 0;
    }
    if (kDefers) std::fill_n(deferred(0), rows * TransposedWidth(x.rows), 0.0f);
  }

  void Multiply() {
    for (int64_t m = 0; m < x_.rows; ++m) std::fill_n(y_ + m * weight_.rows + first_row_, rows_, 0.0f);
    for (int64_t first = 0; first < weight_.columns; first += kColumns) {
      const int64_t last_piece = std::min((first + kColumns) / kPieceColumns, weight_.pieces());
      for (int64_t r = 0; r < rows_; ++r) Expand(r, first / kPieceColumns, last_piece);
      const int64_t columns = last_piece * kPieceColumns - first;
      for (int64_t m = 0; m < x_.rows; m += kTileInputs)
        for (int64_t r = 0; r < rows_; r += kTileWeights)
          EachTileRows<kStepInputs>(m, std::min(m + kTileInputs, x_.rows), [&](auto count, int64_t row) {
            AddProducts<decltype(count)::value>(r, first, columns, row);
          });
    }
    for (int64_t m = 0; m < x_.rows; ++m)
      for (int64_t r = 0; r < rows_; ++r) {
        float& out = y_[m * weight_.rows + first_row_ + r];
        if (kDefers) out += deferred(r)[m];
        out = (quantized ? out * x_.scales[m] : out) + weight_.row_bias(first_row_ + r);
      }
  }

private:
  // Memory of the thread: to look for it is a call.
  static Element* TileMemory() {
    alignas(64) static thread_local Element tile[kStripRows * kTileStride<Element>];
    return tile;
  }
  static float* DeferredMemory() {
    alignas(64) static thread_local float products[kDefers ? kStripRows * kMostInputs : 1];
    return products;
  }
  // The products of row r of the strip that TileDots cannot take, by rows of X.
  float* deferred(int64_t r) const { return deferred_ + r * TransposedWidth(x_.rows); }

  // Puts the weights of these pieces of row r into the tile.
  void Expand(int64_t r, int64_t first_piece, int64_t last_piece) {
    const MaskRow mask(weight_, first_row_ + r);
    Cursor cursor(constants_, starts_[r], ends_[r], &scratch_);
    Element* const row = tile_ + r * kTileStride<Element>;
    int64_t group = 0;
    EachGroup(weight_, weight_.row_scales(first_row_ + r), first_piece, last_piece,
              [&](float scale, int64_t first, int64_t last) {
                Element* weights = row + (first - first_piece) * kPieceColumns;
                if constexpr (kInt4) {
                  ExpandInt4(mask, first, last, &cursor, weights);
                  for (int64_t piece = first; piece < last; ++piece) scales_[piece - first_piece][r] = scale;
                } else if constexpr (quantized) {
                  scales_[group][r] = scale;
                  added_[group++][r] = Isa::kAdded * ExpandInt8(mask, first, last, scale, &cursor, weights);
                } else {
                  ExpandFloats(mask, first, last, scale, &cursor, weights);
                }
              });
    starts_[r] = cursor.values();
    if constexpr (kDefers) DeferTaken(r);
  }

  // The weights of a group, times its scale.
  static void ExpandFloats(const MaskRow& mask, int64_t first, int64_t last, float scale, Cursor* cursor, float* out) {
    for (int64_t piece = first; piece < last; ++piece, out += kPieceColumns)
      cursor->EachFloats(mask.piece(piece), [&](int j, typename Isa::Floats w) {
        Isa::Store(out + j * Isa::kFloats, Isa::Times(w, Isa::Fill(scale)));
      });
  }

  static void ExpandInt4(const MaskRow& mask, int64_t first, int64_t last, Cursor* cursor, int8_t* out) {
    EachPiece<Isa>(
        mask, first, last, cursor,
        [&](int64_t piece, int j, auto w) {
          Isa::StoreBytes(out + (piece - first) * kPieceColumns + j * Isa::kBytes, Isa::PlusEight(w));
        },
        [](int64_t) {});
  }

  // Returns the sum of the weights, without those that are taken out.
  int32_t ExpandInt8(const MaskRow& mask, int64_t first, int64_t last, float scale, Cursor* cursor, int8_t* out) {
    typename Isa::Tally tally;
    uint64_t large = 0; // the pieces with pairs that are too large
    EachPiece<Isa>(
        mask, first, last, cursor,
        [&](int64_t piece, int j, auto w) {
          Isa::StoreBytes(out + (piece - first) * kPieceColumns + j * Isa::kBytes, w);
          tally.Add(w);
        },
        [&](int64_t piece) {
          if constexpr (kDefers) large |= uint64_t{tally.TakeLarge()} << (piece - first);
        });
    return tally.Sum() - TakeLarge(scale, out, first, large);
  }

  // Takes one weight out of each pair that is too large, in those of the pieces from `first` on whose bits are set;
  // returns the sum of these weights.
  int32_t TakeLarge(float scale, int8_t* weights, int64_t first, uint64_t large) {
    int32_t sum = 0;
    if constexpr (kDefers) {
      for (; large != 0; large &= large - 1) {
        const int64_t start = LowestBit(large) * kPieceColumns;
        Isa::EachLargePair(weights + start, [&](int64_t k) {
          int8_t& w = weights[start + k + 1];
          const auto column = static_cast<int32_t>(first * kPieceColumns + start + k + 1);
          taken_[taken_count_++] = {scale * static_cast<float>(w), column};
          sum += w;
          w = 0;
        });
      }
    }
    return sum;
  }

  // Makes the products of the weights that were taken out of row r.
  void DeferTaken(int64_t r) {
    constexpr int64_t kAhead = 4;
    const auto column = [&](int64_t i) { return x_.transposed + taken_[i].column * x_.transposed_width; };
    const auto fetch = [&](int64_t i) {
      if (i >= taken_count_) return;
      for (int64_t m = 0; m < x_.rows; m += 64) Isa::Fetch(reinterpret_cast<const uint8_t*>(column(i) + m));
    };
    for (int64_t i = 0; i < kAhead; ++i) fetch(i);
    float* const out = deferred(r);
    const int64_t rows = x_.rows;
    for (int64_t i = 0; i < taken_count_; ++i) {
      fetch(i + kAhead);
      const int8_t* x = column(i);
      const typename Isa::Floats w = Isa::Fill(taken_[i].weight);
      for (int64_t m = 0; m < rows; m += Isa::kFloats)
        Isa::Store(out + m, Isa::Fma(w, Isa::FromBytes(x + m), Isa::Load(out + m)));
    }
    taken_count_ = 0;
  }

  // Adds the products of kTileWeights rows of the tile, from r on, with `count` rows of X, from m on.
  template <int count> void AddProducts(int64_t r, int64_t first, int64_t columns, int64_t m) {
    const Element* weights = tile_ + r * kTileStride<Element>;
    const int64_t rows = std::min(kTileWeights, rows_ - r);
    float* y = y_ + m * weight_.rows + first_row_ + r;
    float sums[count][kTileWeights] = {}; // of rows some of which are beyond the last
    float* out = rows == kTileWeights ? y : sums[0];
    const int64_t stride_out = rows == kTileWeights ? weight_.rows : kTileWeights;
    if constexpr (kInt4) {
      TileTimesInt4<Isa, count>(weights, &scales_[0][r], columns / kPieceColumns, x_.quantized + m * x_.stride + first,
                                x_.stride, out, stride_out);
    } else if constexpr (quantized) {
      TileTimesInt8<Isa, count>(weights, &scales_[0][r], &added_[0][r], weight_.group_size, first, columns,
                                x_.quantized + m * x_.stride + first, x_.stride, out, stride_out);
    } else {
      TileTimesFloats<Isa, count>(weights, columns, x_.x + m * x_.stride + first, x_.stride, out, stride_out);
    }
    if (rows == kTileWeights) return;
    for (int i = 0; i < count; ++i)
      for (int64_t n = 0; n < rows; ++n) y[i * weight_.rows + n] += sums[i][n];
  }

  const Weight& weight_;
  int64_t first_row_;
  int64_t rows_;
  const Activations& x_;
  float* y_;
  Element* const tile_ = TileMemory();
  float* const deferred_ = DeferredMemory();
  const uint8_t* starts_[kStripRows]; // where each row's values go on
  const uint8_t* ends_[kStripRows];
  OfRows<float> scales_[kTilePieces]; // of the groups of int8, or the pieces of int4
  OfRows<int32_t> added_[kTilePieces]; // what kAdded adds to the sums of the groups of int8
  const typename Isa::Constants constants_;
  typename Isa::template Scratch<type> scratch_;
  struct {
    float weight; // times its scale
    int32_t column; // in the order of x's
  } taken_[kDefers ? kTileColumns<int8_t> / 2 : 1]; // out of the row that is expanded
  int64_t taken_count_ = 0;
};

template <class Isa, ValueType type, bool quantized>
void MultiplyMany(const Weight& weight, const Activations& x, int64_t first_row, int64_t last_row, float* y) {
  for (int64_t row = first_row; row < last_row; row += kStripRows)
    Strip<Isa, type, quantized>(weight, row, std::min(kStripRows, last_row - row), x, y).Multiply();
}

template <class Isa, ValueType type, bool quantized = false>
inline void MultiplyRows(const Weight& weight, const Activations& x, int64_t first_row, int64_t last_row, float* y) {
  if constexpr (quantized && type == ValueType::kInt8) {
    if (x.rows <= kFewRows && weight.dense()) return MultiplyDense<Isa>(weight, x, first_row, last_row, y);
  }
  if (x.rows <= kFewRows) return MultiplyFew<Isa, type, quantized>(weight, x, first_row, last_row, y);
  for (int64_t m = 0; m < x.rows; m += kMostInputs) {
    const Activations part = x.part(m, std::min(kMostInputs, x.rows - m));
    MultiplyMany<Isa, type, quantized>(weight, part, first_row, last_row, y + m * weight.rows);
  }
}

// W of integers.
template <class Isa, ValueType type>
inline void MultiplyIntegers(const Weight& weight, const Activations& x, int64_t first_row, int64_t last_row,
                             float* y) {
  if (x.quantized != nullptr) return MultiplyRows<Isa, type, true>(weight, x, first_row, last_row, y);
  MultiplyRows<Isa, type, false>(weight, x, first_row, last_row, y);
}

// What Kernels::multiply is, for one instruction set.
template <class Isa>
void Multiply(const Weight& weight, const Activations& x, int64_t first_strip, int64_t last_strip, float* y) {
  if (x.rows == 0) return;
  if (weight.tail != nullptr && first_strip < weight.tail_strip && last_strip > weight.tail_strip) {
    Multiply<Isa>(weight, x, first_strip, weight.tail_strip, y);
    first_strip = weight.tail_strip;
  }
  const int64_t first = first_strip * kStripRows;
  const int64_t last = std::min(last_strip * kStripRows, weight.rows);
  switch (weight.type) {
  case ValueType::kFloat32: return MultiplyRows<Isa, ValueType::kFloat32>(weight, x, first, last, y);
  case ValueType::kFloat16: return MultiplyRows<Isa, ValueType::kFloat16>(weight, x, first, last, y);
  case ValueType::kBfloat16: return MultiplyRows<Isa, ValueType::kBfloat16>(weight, x, first, last, y);
  case ValueType::kInt8: return MultiplyIntegers<Isa, ValueType::kInt8>(weight, x, first, last, y);
  case ValueType::kInt4: return MultiplyIntegers<Isa, ValueType::kInt4>(weight, x, first, last, y);
  }
}

// What Kernels::arrange is, for one instruction set.
template <class Isa> void Arrange(int8_t* quantized, int64_t stride) {
  for (int64_t k = 0; k < stride; k += kPieceColumns) Isa::ArrangePiece(quantized + k);
}

// What Kernels::wants_transposed is, for one instruction set.
template <class Isa> bool WantsTransposed(const Weight& weight, const Activations& x) {
  const bool quantized = x.quantized != nullptr && x.rows > kFewRows;
  return weight.type == ValueType::kInt8 && DefersPairs<Isa, ValueType::kInt8>(quantized);
}

// What Kernels::quantize is, for one instruction set.
template <class Isa> float Quantize(const float* x, int64_t columns, int64_t stride, int8_t* quantized) {
  using Floats = typename Isa::Floats;
  const int64_t whole = columns / Isa::kFloats * Isa::kFloats;
  Floats largest = Isa::Zero();
  Floats wrong = Isa::Zero(); // x - x is NaN for what is not finite
  for (int64_t k = 0; k < whole; k += Isa::kFloats) {
    const Floats v = Isa::Load(x + k);
    largest = Isa::LargerSize(largest, v);
    wrong = Isa::Plus(wrong, Isa::Minus(v, v));
  }
  alignas(64) float lanes[Isa::kFloats];
  Isa::Store(lanes, largest);
  float most = *std::max_element(lanes, lanes + Isa::kFloats);
  float not_finite = Isa::Sum(wrong);
  for (int64_t k = whole; k < columns; ++k) {
    most = std::max(most, std::fabs(x[k]));
    not_finite += x[k] - x[k];
  }
  if (std::isnan(not_finite)) {
    std::fill(quantized, quantized + stride, int8_t{0});
    return std::numeric_limits<float>::quiet_NaN();
  }
  float step = most / 127.0f;
  if (step == 0) step = 1.0f;
  const Floats steps = Isa::Fill(step);
  for (int64_t k = 0; k < whole; k += Isa::kFloats)
    Isa::StoreRounded(quantized + k, Isa::Over(Isa::Load(x + k), steps));
  for (int64_t k = whole; k < columns; ++k) {
    const float q = std::nearbyint(x[k] / step); // limited, as a step that is subnormal is not exact
    quantized[k] = static_cast<int8_t>(std::min(127.0f, std::max(-127.0f, q)));
  }
  std::fill(quantized + columns, quantized + stride, int8_t{0});
  return step;
}

} // namespace blockpress
