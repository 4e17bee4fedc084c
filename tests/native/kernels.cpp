#include "harness.h"
void kernels_suite() {}
