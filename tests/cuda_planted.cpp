// The CUDA kernels of log-sum-exp and row statistics, float16 and small heads, on the host: what
// tests/test_cuda_planted.py plants errors in the sources of, and compiles again.
#include <exception>
#include <string>

#include "cuda/emulation/controls.h"
#include "cuda/passes.h"

using namespace flashmaps;
using namespace flashmaps::cuda;

namespace {

Tokens tokens(const void* data, int heads, int count, int dim) {
  return {data, 1, 0, std::int64_t(count) * dim, dim, count};
}

int blocks_of(int count, int size) {
  return (count + size - 1) / size;
}

}  // namespace

// query [heads, queries, dim] and key [heads, keys, dim]; shift [heads, pitch] as the kernels keep
// it between the passes; entropy, top and argtop [queries]. Returns what went wrong, if it showed.
extern "C" [[gnu::visibility("default")]] const char* row_statistics(
    const void* query, const void* key, int heads, int queries, int keys, int dim, int pitch,
    float* shift, float* entropy, float* top, std::int64_t* argtop) {
  static std::string text;
  text.clear();

  Map map;
  map.query = tokens(query, heads, queries, dim);
  map.key = tokens(key, heads, keys, dim);
  map.maps = 1;
  map.heads = heads;
  map.dim = dim;
  map.scale = float(kLog2e);
  map.weight = 1.0f / float(heads);
  map.shift_pitch = pitch;
  const Tiling tiling{2, 1, true};
  const Grid grid{blocks_of(queries, 64), 1, heads, blocks_of(keys, 64)};
  const int shared_bytes = emulation::current_limits().shared_bytes;

  LogSumExpArguments lse;
  lse.map[0] = map;
  lse.tiling = tiling;
  lse.grid = grid;
  lse.shift = shift;
  StatisticsArguments statistics;
  statistics.map[0] = map;
  statistics.map[0].shift = shift;
  statistics.tiling = tiling;
  statistics.grid = grid;
  statistics.grid.parts = 1;
  statistics.out.entropy = entropy;
  statistics.out.top = top;
  statistics.out.argtop = argtop;
  const auto bytes = [](int each, int count) { return std::int64_t(each) * count; };
  const auto memory = [&](const void* at, std::int64_t size, const char* name) {
    return emulation::Memory{reinterpret_cast<std::uintptr_t>(at), size, name};
  };
  emulation::set_memory({
      memory(query, bytes(2 * dim * heads, queries), "query"),
      memory(key, bytes(2 * dim * heads, keys), "key"),
      memory(shift, bytes(4 * heads, pitch), "shift"),
      memory(entropy, bytes(4, queries), "entropy"),
      memory(top, bytes(4, queries), "top"),
      memory(argtop, bytes(8, queries), "argtop"),
  });
  try {
    launch("lse", lse_kernel<Half, 3>, {grid.blocks * heads, 1, 1}, 64, shared_bytes, {}, lse);
    launch("statistics", statistics_kernel<Half, 3>, {grid.blocks, 1, 1}, 64, shared_bytes, {},
           statistics);
  } catch (const std::exception& error) {
    text = error.what();
  }
  return text.c_str();
}
