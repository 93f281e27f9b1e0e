// flashmaps._cuda, and _emulated for tests, which runs the same kernels on the host: structs that
// Python fills with pointers and sizes, and a function for each launch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>

#include "cuda/launch.h"
#if defined(FLASHMAPS_EMULATED)
#include "cuda/emulation/controls.h"
#endif

namespace py = pybind11;
using namespace flashmaps::cuda;

namespace {

// A pointer, which Python has as a number.
template <class Struct, class Base, class T>
void pointer(py::class_<Struct>& to, const char* name, T* Base::* member) {
  to.def_property(
      name, [member](const Struct& s) { return reinterpret_cast<std::uintptr_t>(s.*member); },
      [member](Struct& s, std::uintptr_t p) { s.*member = reinterpret_cast<T*>(p); });
}

// What the passes have in common.
template <class Arguments>
py::class_<Arguments> pass(py::module_& m, const char* name) {
  auto c = py::class_<Arguments>(m, name, py::module_local())
               .def(py::init<>())
               .def_property(
                   "map", [](Arguments& a) -> Map& { return a.map[0]; },
                   [](Arguments& a, const Map& map) { a.map[0] = map; },
                   py::return_value_policy::reference_internal)
               .def_readwrite("tiling", &Arguments::tiling)
               .def_property(
                   "splits", [](const Arguments& a) { return a.grid.splits; },
                   [](Arguments& a, int splits) { a.grid.splits = splits; });
  m.def("shared_bytes", static_cast<int (*)(const Arguments&)>(&shared_bytes));
  return c;
}

}  // namespace

PYBIND11_MODULE(FLASHMAPS_MODULE, m) {
  m.doc() = "CUDA kernels of flashmaps. Private: use flashmaps.AttentionMap.";

  py::class_<Stream>(m, "Stream", py::module_local())
      .def(py::init([](std::uintptr_t handle, int device) { return Stream{handle, device}; }),
           py::arg("handle"), py::arg("device"));
  py::class_<Limits>(m, "Limits", py::module_local())
      .def(py::init([](int multiprocessors, int bytes, int architecture) {
             return Limits{multiprocessors, bytes, architecture};
           }),
           py::arg("multiprocessors"), py::arg("shared_bytes"), py::arg("architecture"))
      .def_readonly("multiprocessors", &Limits::multiprocessors)
      .def_readonly("shared_bytes", &Limits::shared_bytes)
      .def_readonly("architecture", &Limits::architecture);
  m.def("limits", &device_limits, py::arg("device"), "What a device has room for.");

  auto tokens = py::class_<Tokens>(m, "Tokens", py::module_local())
                    .def(py::init<>())
                    .def_readwrite("batches", &Tokens::batches)
                    .def_readwrite("batch_stride", &Tokens::batch_stride)
                    .def_readwrite("head_stride", &Tokens::head_stride)
                    .def_readwrite("token_stride", &Tokens::token_stride)
                    .def_readwrite("count", &Tokens::count);
  tokens.def_property(
      "data", [](const Tokens& t) { return reinterpret_cast<std::uintptr_t>(t.data); },
      [](Tokens& t, std::uintptr_t p) { t.data = reinterpret_cast<const void*>(p); });

  auto map = py::class_<Map>(m, "Map", py::module_local())
                 .def(py::init<>())
                 .def_readwrite("query", &Map::query)
                 .def_readwrite("key", &Map::key)
                 .def_readwrite("maps", &Map::maps)
                 .def_readwrite("heads", &Map::heads)
                 .def_readwrite("dim", &Map::dim)
                 .def_readwrite("scale", &Map::scale)
                 .def_readwrite("weight", &Map::weight)
                 .def_readwrite("bias_pitch", &Map::bias_pitch)
                 .def_readwrite("shift_pitch", &Map::shift_pitch)
                 .def_readwrite("keys_kept", &Map::keys_kept);
  pointer(map, "weights", &Map::weights);
  pointer(map, "pairs", &Map::pairs);
  pointer(map, "bias", &Map::bias);
  pointer(map, "shift", &Map::shift);

  py::class_<Tiling>(m, "Tiling", py::module_local())
      .def(py::init([](int rows, int columns, bool resident) {
             return Tiling{rows, columns, resident};
           }),
           py::arg("warp_rows"), py::arg("warp_columns"), py::arg("resident"))
      .def_readonly("warp_rows", &Tiling::warp_rows)
      .def_readonly("warp_columns", &Tiling::warp_columns)
      .def_readonly("resident", &Tiling::resident);

  auto outputs =
      py::class_<StatisticsOutputs>(m, "StatisticsOutputs", py::module_local()).def(py::init<>());
  pointer(outputs, "total", &StatisticsOutputs::total);
  pointer(outputs, "plogp", &StatisticsOutputs::plogp);
  pointer(outputs, "entropy", &StatisticsOutputs::entropy);
  pointer(outputs, "top", &StatisticsOutputs::top);
  pointer(outputs, "argtop", &StatisticsOutputs::argtop);
  pointer(outputs, "expectation", &StatisticsOutputs::expectation);
  pointer(outputs, "diagonal", &StatisticsOutputs::diagonal);
  pointer(outputs, "dense", &StatisticsOutputs::dense);

  auto lse = pass<LogSumExpArguments>(m, "LogSumExp");
  pointer(lse, "lse", &LogSumExpArguments::lse);
  pointer(lse, "shift", &LogSumExpArguments::shift);
  pointer(lse, "parts", &LogSumExpArguments::parts);

  pass<StatisticsArguments>(m, "Statistics")
      .def_readwrite("out", &StatisticsArguments::out)
      .def_readwrite("grid_width", &StatisticsArguments::grid_width)
      .def_readwrite("grid_height", &StatisticsArguments::grid_height);

  auto product = pass<ProductArguments>(m, "Product");
  pointer(product, "operand", &ProductArguments::operand);
  pointer(product, "out", &ProductArguments::out);
  product.def_readwrite("operand_stride", &ProductArguments::operand_stride)
      .def_readwrite("operand_pitch", &ProductArguments::operand_pitch)
      .def_readwrite("columns", &ProductArguments::columns)
      .def_readwrite("width", &ProductArguments::width)
      .def_readwrite("aligned", &ProductArguments::aligned)
      .def_readwrite("out_pitch", &ProductArguments::out_pitch);

  auto back = pass<ReturnArguments>(m, "Return");
  pointer(back, "out", &ReturnArguments::out);
  back.def_property(
      "back", [](ReturnArguments& a) -> Map& { return a.map[1]; },
      [](ReturnArguments& a, const Map& of) { a.map[1] = of; },
      py::return_value_policy::reference_internal);

  auto prepare = py::class_<PrepareArguments>(m, "Prepare", py::module_local())
                     .def(py::init<>())
                     .def_readwrite("rows", &PrepareArguments::rows)
                     .def_readwrite("pitch", &PrepareArguments::pitch)
                     .def_readwrite("count", &PrepareArguments::count)
                     .def_readwrite("factor", &PrepareArguments::factor);
  pointer(prepare, "in", &PrepareArguments::in);
  pointer(prepare, "out", &PrepareArguments::out);

  py::class_<CombineArguments>(m, "Combine", py::module_local())
      .def(py::init<>())
      .def_readwrite("parts", &CombineArguments::parts)
      .def_readwrite("out", &CombineArguments::out)
      .def_readwrite("count", &CombineArguments::count)
      .def_readwrite("splits", &CombineArguments::splits)
      .def_readwrite("of_columns", &CombineArguments::of_columns);

  auto combine_lse = py::class_<CombineLseArguments>(m, "CombineLse", py::module_local())
                         .def(py::init<>())
                         .def_readwrite("rows", &CombineLseArguments::rows)
                         .def_readwrite("pitch", &CombineLseArguments::pitch)
                         .def_readwrite("count", &CombineLseArguments::count)
                         .def_readwrite("splits", &CombineLseArguments::splits);
  pointer(combine_lse, "parts", &CombineLseArguments::parts);
  pointer(combine_lse, "lse", &CombineLseArguments::lse);
  pointer(combine_lse, "shift", &CombineLseArguments::shift);

  py::enum_<TokenType>(m, "TokenType", py::module_local())
      .value("half", TokenType::Half)
      .value("bfloat", TokenType::BFloat);
  using Released = py::call_guard<py::gil_scoped_release>;
  m.def("lse", &launch_lse, Released());
  m.def("statistics", &launch_statistics, Released());
  m.def("product", &launch_product, Released());
  m.def("round_trip", &launch_return, Released());
  m.def("prepare", &launch_prepare, Released());
  m.def("combine", &launch_combine, Released());
  m.def("combine_lse", &launch_combine_lse, Released());

#if defined(FLASHMAPS_EMULATED)
  namespace em = flashmaps::cuda::emulation;
  m.def("set_limits", &em::set_limits);
  m.def("set_memory",
        [](const std::vector<std::tuple<std::uintptr_t, std::int64_t, std::string>>& memory) {
          std::vector<em::Memory> known;
          for (const auto& [address, bytes, name] : memory) known.push_back({address, bytes, name});
          em::set_memory(std::move(known));
        });
  m.def("take_sites", [] {
    std::vector<std::tuple<std::string, std::string, int, std::int64_t, std::int64_t>> found;
    for (const em::Site& s : em::take_sites()) {
      found.emplace_back(s.primitive, s.file, s.line, s.calls, s.conflicts);
    }
    return found;
  });
  m.def("plant", &em::plant);
#endif
}
