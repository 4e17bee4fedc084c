#include "harness.h"
void failures_suite() {}
