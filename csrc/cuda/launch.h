// Launches of the kernels, for Python. A launch fills in what follows from shapes and tiling, and
// throws where a GPU's error says that it did not happen; it waits for nothing.
#pragma once

#include "cuda/map.h"
#include "cuda/types.h"

namespace flashmaps::cuda {

enum class TokenType : int { Half = 0, BFloat = 1 };

void launch_lse(LogSumExpArguments arguments, TokenType type, Stream stream);
void launch_statistics(StatisticsArguments arguments, TokenType type, Stream stream);
void launch_product(ProductArguments arguments, TokenType type, Stream stream);
void launch_return(ReturnArguments arguments, TokenType type, Stream stream);
void launch_prepare(const PrepareArguments& arguments, Stream stream);
void launch_combine(const CombineArguments& arguments, Stream stream);
void launch_combine_lse(const CombineLseArguments& arguments, Stream stream);

// What a device has room for.
Limits device_limits(int device);

// Shared memory of a block, in bytes.
int shared_bytes(const LogSumExpArguments& arguments);
int shared_bytes(const StatisticsArguments& arguments);
int shared_bytes(const ProductArguments& arguments);
int shared_bytes(const ReturnArguments& arguments);

// The kernels of one type of tokens, heads in pieces of 16 * `steps`: each compiled by itself, from
// variant.cu.
template <class T, int steps>
struct Variant {
  static void lse(const LogSumExpArguments&, Index3 grid, int threads, int bytes, Stream);
  static void statistics(const StatisticsArguments&, Index3 grid, int threads, int bytes, Stream);
  static void product(const ProductArguments&, Index3 grid, int threads, int bytes, Stream);
  static void round_trip(const ReturnArguments&, Index3 grid, int threads, int bytes, Stream);
};

}  // namespace flashmaps::cuda
