// engine_test [suite ..]: runs all suites, or those named. No output and status 0 mean success.
#include <cstring>
#include <map>

#include "harness.h"

int main(int argc, char **argv) {
  const std::map<std::string, void (*)()> suites = {{"choices", choices_suite},
                                                    {"collectives", collectives_suite},
                                                    {"failures", failures_suite},
                                                    {"kernels", kernels_suite},
                                                    {"pool", pool_suite},
                                                    {"rings", rings_suite},
                                                    {"stress", stress_suite}};
  for (const auto &[name, suite] : suites) {
    bool wanted = argc == 1;
    for (int i = 1; i < argc; ++i) wanted |= name == argv[i];
    if (!wanted) continue;
    const double start = seconds();
    doing = name;
    suite();
    std::printf("%s: ok, %.1f s\n", name.c_str(), seconds() - start);
    std::fflush(stdout);
  }
}
