#include "harness.h"
void pool_suite() {}
