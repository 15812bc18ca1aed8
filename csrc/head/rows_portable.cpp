#include "head/rows_impl.h"

namespace fastppo {

const RowKernels kRowsPortable = kKernels;

}  // namespace fastppo
