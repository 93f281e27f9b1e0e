// flashmaps._C: structs that Python fills with pointers and sizes, and two functions on them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>

#include "cpu/dispatch.h"
#include "cpu/gradient.h"
#include "cpu/map.h"

namespace py = pybind11;
using flashmaps::Cost;
using flashmaps::Gradient;
using flashmaps::Gradients;
using flashmaps::Limits;
using flashmaps::Operands;
using flashmaps::Outputs;
using flashmaps::Problem;

namespace {

Outputs outputs_from(const py::dict& pointers) {
  Outputs out;
  const std::pair<const char*, std::uintptr_t*> fields[] = {
      {"lse", &out.lse},
      {"entropy", &out.entropy},
      {"max", &out.max},
      {"argmax", &out.argmax},
      {"expectation", &out.expectation},
      {"diagonal", &out.diagonal},
      {"return_probability", &out.return_probability},
      {"product", &out.product},
      {"dense", &out.dense},
      {"topk_values", &out.topk_values},
      {"topk_indices", &out.topk_indices},
      {"pooled_keys", &out.pooled_keys},
      {"column_sum", &out.column_sum},
      {"column_entropy", &out.column_entropy},
      {"column_max", &out.column_max},
      {"column_argmax", &out.column_argmax},
      {"transposed_product", &out.transposed_product},
  };
  for (const auto& [key, value] : pointers) {
    const auto name = key.cast<std::string>();
    bool known = false;
    for (const auto& [field, pointer] : fields) {
      if (name == field) {
        *pointer = value.cast<std::uintptr_t>();
        known = true;
      }
    }
    if (!known) throw std::invalid_argument("flashmaps._C.reduce: unknown output " + name);
  }
  return out;
}

// A name and the pointer that it stands for.
template <class Struct>
using Field = std::pair<const char*, std::uintptr_t Struct::*>;

// Sets the fields of `to` that `pointers` names; what is unknown is an error.
template <class Struct, std::size_t N>
void fill(Struct& to, const Field<Struct> (&fields)[N], const py::dict& pointers) {
  for (const auto& [key, value] : pointers) {
    const auto name = py::cast<std::string>(key);
    bool known = false;
    for (const auto& [field, pointer] : fields) {
      if (name != field) continue;
      to.*pointer = py::cast<std::uintptr_t>(value);
      known = true;
    }
    if (!known) throw std::invalid_argument("flashmaps._C.backward: unknown tensor " + name);
  }
}

constexpr Field<Gradient> kTerms[] = {
    {"row_add", &Gradient::row_add},
    {"row_log", &Gradient::row_log},
    {"row_back", &Gradient::row_back},
    {"column_add", &Gradient::column_add},
    {"column_log", &Gradient::column_log},
    {"column_back", &Gradient::column_back},
    {"left", &Gradient::left},
    {"right", &Gradient::right},
    {"row_index", &Gradient::row_index},
    {"row_values", &Gradient::row_values},
    {"column_index", &Gradient::column_index},
    {"column_values", &Gradient::column_values},
    {"dense", &Gradient::dense},
    {"cells", &Gradient::cells},
    {"pooled", &Gradient::pooled},
    {"lse", &Gradient::lse},
};
constexpr Field<Gradients> kGradients[] = {
    {"query", &Gradients::query}, {"key", &Gradients::key},
    {"bias", &Gradients::bias},   {"head_weights", &Gradients::head_weights},
    {"lse", &Gradients::lse},
};

[[noreturn]] void cannot_run(const std::string& instruction_set) {
  throw std::invalid_argument("flashmaps: no build for instruction set " + instruction_set +
                              " can run on this machine");
}

Cost backward(const Problem& problem, Gradient gradient, const py::dict& terms,
              const py::dict& pointers, int threads, std::int64_t memory_budget, bool only_plan,
              const std::string& instruction_set) {
  fill(gradient, kTerms, terms);
  Gradients out;
  fill(out, kGradients, pointers);
  const flashmaps::Backward run = flashmaps::find_backward(instruction_set);
  if (run == nullptr) cannot_run(instruction_set);
  const py::gil_scoped_release release;
  return run(problem, gradient, out, Limits{threads, memory_budget, only_plan});
}

Cost reduce(const Problem& problem, const Operands& operands, const py::dict& pointers, int threads,
            std::int64_t memory_budget, bool only_plan, const std::string& instruction_set) {
  const Outputs outputs = outputs_from(pointers);
  const flashmaps::Reduce run = flashmaps::find_reduce(instruction_set);
  if (run == nullptr) cannot_run(instruction_set);
  const py::gil_scoped_release release;
  return run(problem, operands, outputs, Limits{threads, memory_budget, only_plan});
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ kernels of flashmaps. Private: use flashmaps.AttentionMap.";

  py::class_<Problem>(m, "Problem")
      .def(py::init<>())
      .def_readwrite("query", &Problem::query)
      .def_readwrite("query_strides", &Problem::query_strides)
      .def_readwrite("key", &Problem::key)
      .def_readwrite("key_strides", &Problem::key_strides)
      .def_readwrite("dtype", &Problem::dtype)
      .def_readwrite("bias", &Problem::bias)
      .def_readwrite("weights", &Problem::weights)
      .def_readwrite("pairs", &Problem::pairs)
      .def_readwrite("lse", &Problem::lse)
      .def_readwrite("lse_strides", &Problem::lse_strides)
      .def_readwrite("query_batch", &Problem::query_batch)
      .def_readwrite("key_batch", &Problem::key_batch)
      .def_readwrite("maps", &Problem::maps)
      .def_readwrite("heads", &Problem::heads)
      .def_readwrite("queries", &Problem::queries)
      .def_readwrite("keys", &Problem::keys)
      .def_readwrite("dim", &Problem::dim)
      .def_readwrite("key_group", &Problem::key_group)
      .def_readwrite("scale", &Problem::scale)
      .def_readwrite("normalize", &Problem::normalize)
      .def_readwrite("grid_height", &Problem::grid_height)
      .def_readwrite("grid_width", &Problem::grid_width);

  py::class_<Operands>(m, "Operands")
      .def(py::init<>())
      .def_readwrite("right", &Operands::right)
      .def_readwrite("right_columns", &Operands::right_columns)
      .def_readwrite("left", &Operands::left)
      .def_readwrite("left_columns", &Operands::left_columns)
      .def_readwrite("k", &Operands::k)
      .def_readwrite("cells", &Operands::cells)
      .def_readwrite("num_cells", &Operands::num_cells)
      .def_readwrite("partner", &Operands::partner)
      .def_readwrite("partner_line_mass", &Operands::partner_line_mass);

  py::class_<Gradient>(m, "Gradient")
      .def(py::init<>())
      .def_readwrite("columns", &Gradient::columns)
      .def_readwrite("entries", &Gradient::entries)
      .def_readwrite("num_cells", &Gradient::num_cells)
      .def_readwrite("partner", &Gradient::partner)
      .def_readwrite("partner_line_mass", &Gradient::partner_line_mass);

  py::class_<Cost>(m, "Cost")
      .def_readonly("workspace", &Cost::workspace)
      .def_readonly("threads", &Cost::threads)
      .def_readonly("passes", &Cost::passes);

  m.def("reduce", &reduce, py::arg("problem"), py::arg("operands"), py::arg("outputs"),
        py::arg("threads"), py::arg("memory_budget") = 0, py::arg("only_plan") = false,
        py::arg("instruction_set") = "",
        "Fill the outputs, or only plan it; returns what that takes.");
  m.def("backward", &backward, py::arg("problem"), py::arg("gradient"), py::arg("terms"),
        py::arg("gradients"), py::arg("threads"), py::arg("memory_budget") = 0,
        py::arg("only_plan") = false, py::arg("instruction_set") = "",
        "Add to the gradients, which are zero before, or only plan it; returns what that takes.");
  m.def("instruction_sets", &flashmaps::instruction_sets,
        "The builds that this machine can run, best first.");
}
