// gradprune._C: checks arguments and calls the ops. Tensors are passed as addresses, shapes, strides and element types,
// so that the module does not depend on PyTorch's ABI. Callers keep the memory alive; ops run with the GIL released.
// Strides are in elements.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "cpu/cheapest_removals.h"
#include "cpu/grad_stats.h"
#include "cpu/isa.h"
#include "cpu/linear_importance.h"
#include "cpu/mask_gradient.h"
#include "cpu/scale_gradients.h"
#include "cpu/taylor_score.h"

#if defined(GRADPRUNE_CUDA)
#include "cuda/grad_stats.h"
#include "cuda/scale_gradients.h"
#endif

namespace py = pybind11;

namespace gradprune {
namespace {

struct IsaName {
  const char* name;
  Isa isa;
};

constexpr IsaName kIsaNames[] = {{"scalar", Isa::Scalar}, {"avx2", Isa::Avx2}, {"avx512", Isa::Avx512}};

const char* isa_name(Isa isa) {
  for (const IsaName& entry : kIsaNames)
    if (entry.isa == isa) return entry.name;
  return "unknown";
}

Isa parse_isa(const std::string& name) {
  if (name == "auto") return best_isa();
  for (const IsaName& entry : kIsaNames) {
    if (name != entry.name) continue;
    if (!isa_available(entry.isa)) throw std::invalid_argument("isa: this CPU does not support '" + name + "'");
    return entry.isa;
  }
  throw std::invalid_argument("isa: '" + name + "' is none of auto, scalar, avx2, avx512");
}

ElementType parse_type(const char* argument, int code) {
  if (code < 0 || code >= kElementTypes)
    throw std::invalid_argument(std::string(argument) + ": " + std::to_string(code) + " is no element type code");
  return static_cast<ElementType>(code);
}

Side parse_side(const std::string& name) {
  if (name == "rows") return Side::Rows;
  if (name == "columns") return Side::Columns;
  if (name == "both") return Side::Both;
  throw std::invalid_argument("side: '" + name + "' is none of rows, columns, both");
}

// The names of the fields of Statistics, in their order in memory.
std::array<const char*, kStatistics> statistic_names() {
  std::array<const char*, kStatistics> names{};
  names[offsetof(Statistics, sum_abs) / sizeof(double)] = "sum_abs";
  names[offsetof(Statistics, sum_square) / sizeof(double)] = "sum_square";
  names[offsetof(Statistics, max_abs) / sizeof(double)] = "max_abs";
  names[offsetof(Statistics, min_abs) / sizeof(double)] = "min_abs";
  names[offsetof(Statistics, non_finite) / sizeof(double)] = "non_finite";
  return names;
}

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

void* pointer(const char* argument, std::uintptr_t address, std::ptrdiff_t count) {
  if (address == 0 && count != 0) throw std::invalid_argument(std::string(argument) + ": null address");
  return reinterpret_cast<void*>(address);
}

using MatrixArgument = std::tuple<std::uintptr_t, std::ptrdiff_t, int>;  // address, row stride, element type
// Address, strides between samples and tokens, element type.
using ActivationsArgument = std::tuple<std::uintptr_t, std::ptrdiff_t, std::ptrdiff_t, int>;
// Addresses of row_abs, row_square, column_abs, column_square and statistics; 0 for a side that is not asked for.
using OutputAddresses = std::array<std::uintptr_t, 2 * kScores + 1>;
using GradientArgument = std::tuple<std::uintptr_t, std::ptrdiff_t, int>;  // address, number of elements, element type

Matrix parse_matrix(const char* name, const MatrixArgument& argument, std::ptrdiff_t elements) {
  const auto [address, stride, code] = argument;
  return {pointer(name, address, elements), stride, parse_type(name, code)};
}

Activations parse_activations(const char* name, const ActivationsArgument& argument, std::ptrdiff_t elements) {
  const auto [address, sample_stride, token_stride, code] = argument;
  return {pointer(name, address, elements), sample_stride, token_stride, parse_type(name, code)};
}

TaylorOutputs parse_outputs(const OutputAddresses& addresses, const std::string& side, std::ptrdiff_t rows,
                            std::ptrdiff_t columns) {
  TaylorOutputs outputs{};
  outputs.side = parse_side(side);
  for (int s = 0; s < kScores; ++s) {
    if (has_rows(outputs.side)) outputs.row[s] = pointer("outputs", addresses[s], rows);
    if (has_columns(outputs.side)) outputs.column[s] = pointer("outputs", addresses[kScores + s], columns);
  }
  outputs.statistics = pointer("outputs", addresses[2 * kScores], kStatistics);
  return outputs;
}

void taylor_score_binding(const MatrixArgument& w_argument, const MatrixArgument& g_argument, std::ptrdiff_t rows,
                          std::ptrdiff_t columns, const std::string& side, const OutputAddresses& addresses,
                          int threads, const std::string& isa_argument) {
  require(rows >= 0 && columns >= 0, "rows, columns: must not be negative");
  require(threads >= 1, "threads: must be at least 1");
  const Matrix w = parse_matrix("w", w_argument, rows * columns), g = parse_matrix("g", g_argument, rows * columns);
  require(taylor_score_supports(w.type, g.type), "w, g: both must be fp64, or neither");
  const Isa isa = parse_isa(isa_argument);
  const TaylorOutputs outputs = parse_outputs(addresses, side, rows, columns);
  py::gil_scoped_release release;
  taylor_score(w, g, rows, columns, outputs, threads, isa);
}

void linear_importance_binding(const ActivationsArgument& x_argument, const ActivationsArgument& dy_argument,
                               const MatrixArgument& w_argument, const std::array<std::ptrdiff_t, 4>& sizes,
                               const std::string& side, const OutputAddresses& addresses, int threads,
                               const std::string& isa_argument) {
  const auto [samples, tokens, rows, columns] = sizes;
  require(samples >= 0 && tokens >= 0 && rows >= 0 && columns >= 0, "sizes: must not be negative");
  require(threads >= 1, "threads: must be at least 1");
  const Activations x = parse_activations("x", x_argument, samples * tokens * columns);
  const Activations dy = parse_activations("dy", dy_argument, samples * tokens * rows);
  const Matrix w = parse_matrix("w", w_argument, rows * columns);
  require(taylor_score_supports(w.type, x.type) && taylor_score_supports(w.type, dy.type),
          "x, dy, w: all must be fp64, or none");
  const Isa isa = parse_isa(isa_argument);
  const TaylorOutputs outputs = parse_outputs(addresses, side, rows, columns);
  py::gil_scoped_release release;
  linear_importance(x, dy, w, {samples, tokens, rows, columns}, outputs, threads, isa);
}

void grouped_linear_importance_binding(const ActivationsArgument& x_argument, const ActivationsArgument& dy_argument,
                                       const MatrixArgument& w_argument, std::ptrdiff_t w_expert_stride,
                                       const std::vector<std::int64_t>& offsets,
                                       const std::array<std::ptrdiff_t, 4>& sizes, const std::string& side,
                                       const OutputAddresses& addresses, int threads, const std::string& isa_argument) {
  const auto [experts, samples, rows, columns] = sizes;
  require(experts >= 0 && samples >= 0 && rows >= 0 && columns >= 0, "sizes: must not be negative");
  require(threads >= 1, "threads: must be at least 1");
  require(static_cast<std::ptrdiff_t>(offsets.size()) == experts * samples + 1, "offsets: experts * samples + 1 are needed");
  require(offsets.front() >= 0, "offsets: must not be negative");
  for (std::size_t k = 1; k < offsets.size(); ++k) require(offsets[k - 1] <= offsets[k], "offsets: must not descend");
  const Activations x = parse_activations("x", x_argument, offsets.back() * columns);
  const Activations dy = parse_activations("dy", dy_argument, offsets.back() * rows);
  const Matrix w = parse_matrix("w", w_argument, experts * rows * columns);
  require(taylor_score_supports(w.type, x.type) && taylor_score_supports(w.type, dy.type),
          "x, dy, w: all must be fp64, or none");
  const Isa isa = parse_isa(isa_argument);
  const TaylorOutputs outputs = parse_outputs(addresses, side, experts * rows, experts * columns);
  py::gil_scoped_release release;
  grouped_linear_importance(x, dy, w, w_expert_stride, offsets.data(), {experts, samples, rows, columns}, outputs,
                            threads, isa);
}

void mask_gradient_binding(const ActivationsArgument& x_argument, const ActivationsArgument& dx_argument,
                           const std::array<std::ptrdiff_t, 3>& sizes, const std::array<std::uintptr_t, 2>& addresses,
                           int threads, const std::string& isa_argument) {
  const auto [samples, tokens, columns] = sizes;
  require(samples >= 0 && tokens >= 0 && columns >= 0, "sizes: must not be negative");
  require(threads >= 1, "threads: must be at least 1");
  const Activations x = parse_activations("x", x_argument, samples * tokens * columns);
  const Activations dx = parse_activations("dx", dx_argument, samples * tokens * columns);
  require(x.type == dx.type, "x, dx: must be of one type");
  const Isa isa = parse_isa(isa_argument);
  const MaskOutputs outputs{pointer("outputs", addresses[0], samples * columns),
                            pointer("outputs", addresses[1], samples * columns)};
  py::gil_scoped_release release;
  mask_gradient(x, dx, samples, tokens, columns, outputs, threads, isa);
}

void cheapest_removals_binding(const std::tuple<std::uintptr_t, std::ptrdiff_t>& inverse,
                               const std::tuple<std::uintptr_t, std::ptrdiff_t>& gram, std::ptrdiff_t columns,
                               std::ptrdiff_t count, const std::array<std::uintptr_t, 2>& addresses,
                               const std::string& isa_argument) {
  require(columns >= 0, "columns: must not be negative");
  require(count >= 0 && count <= columns, "count: must be 0 to columns");
  const auto matrix = [&](const char* name, const auto& argument) {
    return static_cast<const double*>(pointer(name, std::get<0>(argument), columns));
  };
  const RemovalInputs inputs{matrix("inverse", inverse), std::get<1>(inverse), matrix("gram", gram), std::get<1>(gram),
                             columns};
  const Isa isa = parse_isa(isa_argument);
  auto* taken = static_cast<std::int64_t*>(pointer("outputs", addresses[0], count));
  auto* costs = static_cast<double*>(pointer("outputs", addresses[1], count));
  py::gil_scoped_release release;
  cheapest_removals(inputs, count, taken, costs, isa);
}

std::vector<Gradient> parse_gradients(const std::vector<GradientArgument>& arguments) {
  std::vector<Gradient> gradients;
  gradients.reserve(arguments.size());
  for (const auto& [address, count, code] : arguments) {
    require(count >= 0, "gradients: the number of elements must not be negative");
    gradients.push_back({pointer("gradients", address, count), count, parse_type("gradients", code)});
  }
  return gradients;
}

void grad_stats_binding(const std::vector<GradientArgument>& arguments, std::uintptr_t out, int threads,
                        const std::string& isa_argument) {
  require(threads >= 1, "threads: must be at least 1");
  const std::vector<Gradient> gradients = parse_gradients(arguments);
  const Isa isa = parse_isa(isa_argument);
  auto* statistics = static_cast<Statistics*>(pointer("out", out, static_cast<std::ptrdiff_t>(gradients.size())));
  py::gil_scoped_release release;
  grad_stats(gradients, statistics, threads, isa);
}

void scale_gradients_binding(const std::vector<GradientArgument>& arguments, const std::vector<double>& scales,
                             int threads, const std::string& isa_argument) {
  require(threads >= 1, "threads: must be at least 1");
  require(scales.size() == arguments.size(), "scales: one per gradient is needed");
  const std::vector<Gradient> gradients = parse_gradients(arguments);
  const Isa isa = parse_isa(isa_argument);
  py::gil_scoped_release release;
  scale_gradients(gradients, scales, threads, isa);
}

#if defined(GRADPRUNE_CUDA)
using ChunksArgument = std::tuple<std::uintptr_t, std::int64_t>;  // address, rows

ChunkTable parse_chunks(const ChunksArgument& argument) {
  const auto [address, count] = argument;
  require(count >= 0 && count <= std::numeric_limits<std::int32_t>::max(), "chunks: must be 0 to 2^31 - 1");
  return {static_cast<const Chunk*>(pointer("chunks", address, count)), count};
}

void grad_stats_cuda_binding(const ChunksArgument& chunks, std::uintptr_t first_chunks, std::int64_t gradients,
                             std::uintptr_t of_chunks, std::uintptr_t out, std::uintptr_t stream) {
  require(gradients >= 0 && gradients <= std::numeric_limits<std::int32_t>::max(), "gradients: must be 0 to 2^31 - 1");
  const ChunkTable table = parse_chunks(chunks);
  const auto* first = static_cast<const std::int64_t*>(pointer("first_chunks", first_chunks, gradients));
  auto* scratch = static_cast<Statistics*>(pointer("of_chunks", of_chunks, table.count));
  auto* statistics = static_cast<Statistics*>(pointer("out", out, gradients));
  py::gil_scoped_release release;
  grad_stats_cuda(table, first, gradients, scratch, statistics, reinterpret_cast<Stream>(stream));
}

void scale_gradients_cuda_binding(const ChunksArgument& chunks, std::uintptr_t scales, std::uintptr_t stream) {
  const ChunkTable table = parse_chunks(chunks);
  const auto* factors = static_cast<const double*>(pointer("scales", scales, table.count));
  py::gil_scoped_release release;
  scale_gradients_cuda(table, factors, reinterpret_cast<Stream>(stream));
}
#endif

py::dict build_info() {
  py::dict info;
  py::list isas;
  for (const IsaName& entry : kIsaNames)
    if (isa_available(entry.isa)) isas.append(entry.name);
  info["isa"] = isa_name(best_isa());
  info["isas"] = isas;
#if defined(_OPENMP)
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
#if defined(GRADPRUNE_CUDA)
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
  info["compiler"] = __VERSION__;
  return info;
}

}  // namespace
}  // namespace gradprune

PYBIND11_MODULE(_C, m) {
  using namespace gradprune;
  m.doc() = "C++ kernels of gradprune. Memory is given by address; callers keep it alive.";
  m.attr("FLOAT32") = static_cast<int>(ElementType::Float32);
  m.attr("BFLOAT16") = static_cast<int>(ElementType::BFloat16);
  m.attr("FLOAT16") = static_cast<int>(ElementType::Float16);
  m.attr("FLOAT64") = static_cast<int>(ElementType::Float64);
  m.attr("STATISTICS") = statistic_names();
  m.def("taylor_score", &taylor_score_binding, py::arg("w"), py::arg("g"), py::arg("rows"), py::arg("columns"),
        py::arg("side"), py::arg("outputs"), py::arg("threads"), py::arg("isa") = "auto",
        "Row and column sums of a weight times its gradient. w, g: (address, row stride, type). side: rows, columns or "
        "both. outputs: addresses of row_abs, row_square, column_abs, column_square and statistics; 0 for a side that "
        "is not asked for.");
  m.def("linear_importance", &linear_importance_binding, py::arg("x"), py::arg("dy"), py::arg("w"), py::arg("sizes"),
        py::arg("side"), py::arg("outputs"), py::arg("threads"), py::arg("isa") = "auto",
        "taylor_score of each sample's weight gradient, summed over samples. x, dy: (address, sample stride, token "
        "stride, type). w, side, outputs: see taylor_score. sizes: samples, tokens, rows, columns.");
  m.def("grouped_linear_importance", &grouped_linear_importance_binding, py::arg("x"), py::arg("dy"), py::arg("w"),
        py::arg("w_expert_stride"), py::arg("offsets"), py::arg("sizes"), py::arg("side"), py::arg("outputs"),
        py::arg("threads"), py::arg("isa") = "auto",
        "linear_importance of each expert's weight on its own tokens. x, dy: [tokens of all experts, width], sorted by "
        "expert and sample; their sample strides are not used. w: the first expert's weight. offsets: the tokens at "
        "which each expert's samples begin, and the end. sizes: experts, samples, rows, columns. outputs: the first "
        "expert's addresses in [experts, 2, length] and [experts, 5].");
  m.def("mask_gradient", &mask_gradient_binding, py::arg("x"), py::arg("dx"), py::arg("sizes"), py::arg("outputs"),
        py::arg("threads"), py::arg("isa") = "auto",
        "Sums over tokens of x dx and of x^2, by sample. x, dx: see linear_importance, both of one type. sizes: "
        "samples, tokens, columns. outputs: two addresses, each of [samples, columns].");
  m.def("cheapest_removals", &cheapest_removals_binding, py::arg("inverse"), py::arg("gram"), py::arg("columns"),
        py::arg("count"), py::arg("outputs"), py::arg("isa") = "auto",
        "Remove columns one by one, each time the cheapest. inverse, gram: (address, row stride) of fp64 matrices "
        "[columns, columns]. outputs: addresses of taken, [count] int64, and costs, [count] fp64.");
  m.def("grad_stats", &grad_stats_binding, py::arg("gradients"), py::arg("out"), py::arg("threads"),
        py::arg("isa") = "auto",
        "Statistics of K gradients, (address, elements, type) each, written to out: the address of [K, 5] fp64, in the "
        "order of STATISTICS.");
  m.def("scale_gradients", &scale_gradients_binding, py::arg("gradients"), py::arg("scales"), py::arg("threads"),
        py::arg("isa") = "auto", "Scale gradients, (address, elements, type) each, in place.");
#if defined(GRADPRUNE_CUDA)
  m.def("grad_stats_cuda", &grad_stats_cuda_binding, py::arg("chunks"), py::arg("first_chunks"), py::arg("gradients"),
        py::arg("of_chunks"), py::arg("out"), py::arg("stream"),
        "Statistics of gradients on the current device, written to out: the address of [gradients, 5] fp64. chunks: "
        "(address, rows) of an int64 table of address, elements, type, gradient. first_chunks: address of "
        "[gradients + 1] int64. of_chunks: address of [rows, 5] fp64 scratch. All memory is on the device. "
        "Asynchronous on the stream.");
  m.def("scale_gradients_cuda", &scale_gradients_cuda_binding, py::arg("chunks"), py::arg("scales"),
        py::arg("stream"),
        "Scale gradients on the current device in place. chunks: see grad_stats_cuda. scales: address of [gradients] "
        "fp64. All memory is on the device. Asynchronous on the stream.");
  m.def("cuda_fault", &cuda_fault, "The reason why the CUDA kernels cannot run on the current device, or None.");
#endif
  m.def("build_info", &build_info,
        "isa: the instruction set that 'auto' uses. isas: the available ones. openmp, cuda: whether the build has "
        "them. compiler: its version.");
}
