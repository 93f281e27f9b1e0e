// Picks, when the program runs, the build of the kernels that this machine can execute.
#pragma once

#include <string>
#include <vector>

#include "cpu/gradient.h"
#include "cpu/map.h"

namespace flashmaps {

// The builds in this library that this machine can run, best first.
std::vector<std::string> instruction_sets();

// The build called `name`, or the best one for an empty name; nullptr where it cannot run here.
Reduce find_reduce(const std::string& name);
Backward find_backward(const std::string& name);

}  // namespace flashmaps
