// Bindings of a transformer's layers (attention.h, dense.h, pointwise.h). Tensors come as addresses, which
// fastppo/models/layers.py has checked: there are thousands of calls in a step, of some microseconds each, and an exchange
// by DLPack takes as long.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <tuple>
#include <vector>

#include "attention.h"
#include "bindings.h"
#include "dense.h"
#include "pointwise.h"

namespace nb = nanobind;

namespace fastppo {
namespace {

using Address = std::uintptr_t;  // 0: there is none
using MatrixArgs = std::tuple<Address, bool, std::int64_t, std::int64_t>;  // bfloat16 or float32; rows, columns
using LayerArgs = std::tuple<MatrixArgs, Address, Address, Address, Address>;  // weight, bias, y, ∂weight, ∂bias
using Settings = std::tuple<int, std::optional<std::string>>;  // threads, instruction set

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

Matrix matrix_at(const MatrixArgs& args) {
    const auto& [address, half, rows, cols] = args;
    return {at<const void>(address), half ? Type::bfloat16 : Type::float32, rows, cols, cols};
}

Machine machine(const Settings& settings) {
    if (products().bfloat16 == nullptr) throw nb::value_error("no products in bfloat16: call use_products first");
    return {parse_isa(std::get<1>(settings)), std::get<0>(settings), products()};
}

Dense dense(const MatrixArgs& x, const std::vector<LayerArgs>& layers, Address d_x, const Settings& settings) {
    Dense d;
    d.x = matrix_at(x);
    for (const auto& [weight, bias, y, d_weight, d_bias] : layers) {
        const Matrix w = matrix_at(weight);
        d.layers.push_back({w, at<const float>(bias), {at<const void>(y), Type::bfloat16, d.x.rows, w.rows, w.rows},
                            at<void>(d_weight), at<float>(d_bias)});
    }
    d.d_x = d.x;
    d.d_x.data = at<const void>(d_x);
    d.machine = machine(settings);
    return d;
}

void forward(const MatrixArgs& x, const std::vector<LayerArgs>& layers, const Settings& settings) {
    const Dense d = dense(x, layers, 0, settings);
    nb::gil_scoped_release released;
    dense_forward(d);
}

void backward(const MatrixArgs& x, const std::vector<LayerArgs>& layers, Address d_x, const Settings& settings) {
    const Dense d = dense(x, layers, d_x, settings);
    nb::gil_scoped_release released;
    dense_backward(d);
}

void norm(Address x, Address weight, float eps, std::int64_t rows, std::int64_t n, Address y, Address scales,
          const Settings& settings) {
    const Isa isa = parse_isa(std::get<1>(settings));
    nb::gil_scoped_release released;
    rms_norm(at<const float>(x), at<const float>(weight), eps, rows, n, isa, std::get<0>(settings), at<float>(y),
             at<float>(scales));
}

void norm_backward(Address x, Address weight, Address scales, Address d_y, std::int64_t rows, std::int64_t n,
                   Address d_x, Address d_weight, const Settings& settings) {
    const Isa isa = parse_isa(std::get<1>(settings));
    nb::gil_scoped_release released;
    rms_norm_backward(at<const float>(x), at<const float>(weight), at<const float>(scales), at<const float>(d_y), rows,
                      n, isa, std::get<0>(settings), at<float>(d_x), at<float>(d_weight));
}

using Half = std::uint16_t;

void gate(Address gate, Address up, std::int64_t n, Address h, const Settings& settings) {
    const Isa isa = parse_isa(std::get<1>(settings));
    nb::gil_scoped_release released;
    gated(at<const Half>(gate), at<const Half>(up), n, isa, std::get<0>(settings), at<Half>(h));
}

void gate_backward(Address gate, Address up, Address d_h, std::int64_t n, Address d_gate, Address d_up,
                   const Settings& settings) {
    const Isa isa = parse_isa(std::get<1>(settings));
    nb::gil_scoped_release released;
    gated_backward(at<const Half>(gate), at<const Half>(up), at<const Half>(d_h), n, isa, std::get<0>(settings),
                   at<Half>(d_gate), at<Half>(d_up));
}

// address, bfloat16 or float32, strides of sequences, heads and rows
using HeadsArgs = std::tuple<Address, bool, std::int64_t, std::int64_t, std::int64_t>;
using SizeArgs = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t>;
using MaskArgs = std::tuple<Address, std::int64_t, std::int64_t>;

Heads heads_at(const HeadsArgs& args) {
    const auto& [address, half, batch_stride, head_stride, row_stride] = args;
    return {at<const void>(address), half ? Type::bfloat16 : Type::float32, batch_stride, head_stride, row_stride};
}

Attention attention(const SizeArgs& sizes, const std::vector<HeadsArgs>& qkv_out, const MaskArgs& mask, float scale,
                    Address log_sums, const Settings& settings) {
    Attention a;
    std::tie(a.batch, a.heads, a.key_heads, a.queries, a.keys, a.dim) = sizes;
    a.q = heads_at(qkv_out.at(0));
    a.k = heads_at(qkv_out.at(1));
    a.v = heads_at(qkv_out.at(2));
    a.out = heads_at(qkv_out.at(3));
    a.visible = at<const std::uint8_t>(std::get<0>(mask));
    a.visible_batch_stride = std::get<1>(mask);
    a.visible_row_stride = std::get<2>(mask);
    a.scale = scale;
    a.log_sums = at<float>(log_sums);
    a.machine = machine(settings);
    return a;
}

void attend(const SizeArgs& sizes, const std::vector<HeadsArgs>& qkv_out, const MaskArgs& mask, float scale,
            Address log_sums, const Settings& settings) {
    const Attention a = attention(sizes, qkv_out, mask, scale, log_sums, settings);
    nb::gil_scoped_release released;
    attention_forward(a);
}

void attend_backward(const SizeArgs& sizes, const std::vector<HeadsArgs>& qkv_out, const MaskArgs& mask, float scale,
                     Address log_sums, const std::vector<HeadsArgs>& gradients, const Settings& settings) {
    Attention a = attention(sizes, qkv_out, mask, scale, log_sums, settings);
    a.d_q = heads_at(gradients.at(0));
    a.d_k = heads_at(gradients.at(1));
    a.d_v = heads_at(gradients.at(2));
    nb::gil_scoped_release released;
    attention_backward(a);
}

}  // namespace

void bind_layers(nb::module_& m) {
    using namespace nb::literals;
    m.def("dense_forward", &forward, "x"_a, "layers"_a, "settings"_a);
    m.def("dense_backward", &backward, "x"_a, "layers"_a, "d_x"_a, "settings"_a);
    m.def("attention", &attend, "sizes"_a, "qkv_out"_a, "mask"_a, "scale"_a, "log_sums"_a, "settings"_a);
    m.def("attention_backward", &attend_backward, "sizes"_a, "qkv_out"_a, "mask"_a, "scale"_a, "log_sums"_a,
          "gradients"_a, "settings"_a);
    m.def("rms_norm", &norm, "x"_a, "weight"_a, "eps"_a, "rows"_a, "n"_a, "y"_a, "scales"_a, "settings"_a);
    m.def("rms_norm_backward", &norm_backward, "x"_a, "weight"_a, "scales"_a, "d_y"_a, "rows"_a, "n"_a, "d_x"_a,
          "d_weight"_a, "settings"_a);
    m.def("gated", &gate, "gate"_a, "up"_a, "n"_a, "h"_a, "settings"_a);
    m.def("gated_backward", &gate_backward, "gate"_a, "up"_a, "d_h"_a, "n"_a, "d_gate"_a, "d_up"_a, "settings"_a);
}

}  // namespace fastppo
