// What the files of bindings share.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <optional>
#include <string>

#include "runtime/cpu.h"
#include "head/products.h"

namespace fastppo {

template <typename T>
using Flat = nanobind::ndarray<T, nanobind::ndim<1>, nanobind::c_contig, nanobind::device::cpu>;

using Any = nanobind::ndarray<nanobind::device::cpu>;

// TypeError, ValueError where it is no matrix of float32, bfloat16 or float16 in whole rows.
Matrix matrix(const Any& a);

// PyTorch's microkernels, those that work here.
const Products& products();

// The instruction set of that name, or the best there is; ValueError where the machine or the build lacks it.
Isa parse_isa(const std::optional<std::string>& wanted);

void bind_linear(nanobind::module_& m);
void bind_products(nanobind::module_& m);

}  // namespace fastppo
