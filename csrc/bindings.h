// What the files of bindings share.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <optional>
#include <string>

#include "cpu.h"

namespace fastppo {

template <typename T>
using Flat = nanobind::ndarray<T, nanobind::ndim<1>, nanobind::c_contig, nanobind::device::cpu>;

// The instruction set of that name, or the best there is; ValueError where the machine or the build lacks it.
Isa parse_isa(const std::optional<std::string>& wanted);

void bind_linear(nanobind::module_& m);

}  // namespace fastppo
