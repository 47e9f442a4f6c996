// Python functions of fastcls._C that pass by the dispatcher.
#pragma once

#include <Python.h>

namespace fastcls {

// Adds cross_entropy_plain and is_one to the module.
void add_cross_entropy_calls(PyObject* module);

}  // namespace fastcls
