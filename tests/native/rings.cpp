#include "harness.h"
void rings_suite() {}
