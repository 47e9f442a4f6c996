// cross_entropy_plain: the commonest call of cross_entropy from Python straight to the kernel. For
// a few rows, dispatcher and stable interface would take longer than PyTorch's whole loss.
//
// Tensors are seen through the DLPack exchange table that torch.Tensor carries (a C interface, as
// stable as the other one), outputs come from torch.empty_like. Whatever is not the commonest case,
// errors included, gets None: the caller goes on to the op, which serves everything.
#include "cross_entropy_call.h"

#include <cstdint>
#include <exception>
#include <initializer_list>
#include <utility>

#include "cpu/cross_entropy_plain.h"

namespace fastcls {

namespace {

using cpu::PlainCrossEntropy;
using torch::headeronly::ScalarType;

// DLPack 1.x as far as it is read here; its layout is fixed within a major version.
struct DlTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  const int64_t* shape;
  const int64_t* strides;
  uint64_t byte_offset;
};
struct DlExchange {
  uint32_t major, minor;
  const DlExchange* previous;
  void *allocate, *from_python, *to_python;
  int (*tensor_from_python)(void* object, DlTensor* out);  // borrows; null where there is none
};
constexpr int kDlCpu = 1;
constexpr int kDlInt = 0, kDlFloat = 2, kDlBfloat = 4;

// An owned reference, or null.
class Ref {
 public:
  explicit Ref(PyObject* object = nullptr) : object_(object) {}
  Ref(Ref&& other) noexcept : object_(other.release()) {}
  Ref& operator=(Ref&& other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }
  ~Ref() { Py_XDECREF(object_); }
  PyObject* get() const { return object_; }
  PyObject* release() {
    PyObject* object = object_;
    object_ = nullptr;
    return object;
  }
  explicit operator bool() const { return object_ != nullptr; }

 private:
  PyObject* object_;
};

// What is looked up once: all of it, or the plain path is never taken. References live for ever.
struct Torch {
  PyObject *tensor, *empty_like, *float_scalar, *bfloat16_scalar, *is_grad_enabled;
  PyObject *is_autocast_enabled, *cpu, *forward_ad, *current_level, *requires_grad, *is_neg;
  PyObject *dispatch_modes, *function_modes, *functorch_active, *tracing_state, *profiler_enabled;
  int (*view)(void* object, DlTensor* out) = nullptr;
};
Torch torch_;
bool available = false;

// module.a.b.…, as a new reference
Ref attribute(PyObject* object, std::initializer_list<const char*> path) {
  Py_INCREF(object);
  Ref at(object);
  for (const char* name : path)
    if (at) at = Ref(PyObject_GetAttrString(at.get(), name));
  return at;
}

Ref empty_scalar(PyObject* torch, const char* dtype) {
  const Ref empty = attribute(torch, {"empty"}), type = attribute(torch, {dtype});
  if (!empty || !type) return Ref();
  const Ref args(Py_BuildValue("(())"));
  const Ref names(Py_BuildValue("{s:O,s:s}", "dtype", type.get(), "device", "cpu"));
  return Ref(PyObject_Call(empty.get(), args.get(), names.get()));
}

bool find_view() {
  const Ref capsule = attribute(torch_.tensor, {"__dlpack_c_exchange_api__"});
  if (!capsule || !PyCapsule_IsValid(capsule.get(), "dlpack_exchange_api")) return false;
  auto* table =
      static_cast<const DlExchange*>(PyCapsule_GetPointer(capsule.get(), "dlpack_exchange_api"));
  while (table && table->major != 1) table = table->previous;
  if (table) torch_.view = table->tensor_from_python;
  return torch_.view != nullptr;
}

bool look_up() {
  const Ref torch(PyImport_ImportModule("torch"));
  const Ref forward_ad(PyImport_ImportModule("torch.autograd.forward_ad"));
  if (!torch || !forward_ad) return false;
  bool found = true;
  const auto keep = [&](PyObject*& slot, Ref value) {
    found = found && value;
    slot = value.release();
  };
  PyObject* const root = torch.get();
  keep(torch_.tensor, attribute(root, {"Tensor"}));
  keep(torch_.empty_like, attribute(root, {"empty_like"}));
  keep(torch_.float_scalar, empty_scalar(root, "float32"));
  keep(torch_.bfloat16_scalar, empty_scalar(root, "bfloat16"));
  keep(torch_.is_grad_enabled, attribute(root, {"is_grad_enabled"}));
  keep(torch_.is_autocast_enabled, attribute(root, {"is_autocast_enabled"}));
  keep(torch_.dispatch_modes, attribute(root, {"_C", "_len_torch_dispatch_stack"}));
  keep(torch_.function_modes, attribute(root, {"_C", "_len_torch_function_stack"}));
  keep(torch_.functorch_active, attribute(root, {"_C", "_are_functorch_transforms_active"}));
  keep(torch_.tracing_state, attribute(root, {"_C", "_get_tracing_state"}));
  keep(torch_.profiler_enabled, attribute(root, {"_C", "_autograd", "_profiler_enabled"}));
  keep(torch_.forward_ad, attribute(forward_ad.get(), {}));
  keep(torch_.cpu, Ref(PyUnicode_InternFromString("cpu")));
  keep(torch_.current_level, Ref(PyUnicode_InternFromString("_current_level")));
  keep(torch_.requires_grad, Ref(PyUnicode_InternFromString("requires_grad")));
  keep(torch_.is_neg, Ref(PyUnicode_InternFromString("is_neg")));
  return found && find_view() && Py_IS_TYPE(torch_.float_scalar, (PyTypeObject*)torch_.tensor);
}

bool is_number(const Ref& value, long number) {
  return value && PyLong_Check(value.get()) && PyLong_AsLong(value.get()) == number;
}
Ref call(PyObject* function) { return Ref(PyObject_CallNoArgs(function)); }

// Does anything look on that wants to see the op, or wants more of it than loss and gradient?
bool somebody_watches() {
  return !is_number(call(torch_.dispatch_modes), 0) || !is_number(call(torch_.function_modes), 0) ||
         call(torch_.functorch_active).get() != Py_False ||
         call(torch_.tracing_state).get() != Py_None ||
         call(torch_.profiler_enabled).get() != Py_False ||
         !is_number(Ref(PyObject_GetAttr(torch_.forward_ad, torch_.current_level)), -1);
}

// A plain CPU tensor with memory, seen through `out`.
bool view(PyObject* object, DlTensor* out) {
  return Py_IS_TYPE(object, reinterpret_cast<PyTypeObject*>(torch_.tensor)) &&
         torch_.view(object, out) == 0 && out->device_type == kDlCpu && out->data &&
         out->lanes == 1;
}
void* data_of(const DlTensor& t) { return static_cast<char*>(t.data) + t.byte_offset; }

// Fills in what the tensors say. False where the plain kernel does not serve them.
bool read_tensors(PyObject* input, PyObject* target, PlainCrossEntropy* plain) {
  DlTensor x, y;
  if (!view(input, &x) || !view(target, &y)) return false;
  const bool is_float = x.code == kDlFloat && x.bits == 32;
  if (!is_float && !(x.code == kDlBfloat && x.bits == 16)) return false;
  if (y.code != kDlInt || y.bits != 64 || x.ndim != 2 || y.ndim != 1) return false;
  const int64_t rows = x.shape[0], C = x.shape[1];
  if (rows < 1 || C < 1 || x.strides[0] != C || x.strides[1] != 1) return false;
  if (y.shape[0] != rows || y.strides[0] != 1) return false;
  // A lazily negated view has the memory of what it negates.
  if (Ref(PyObject_CallMethodNoArgs(input, torch_.is_neg)).get() != Py_False) return false;
  if (Ref(PyObject_CallMethodNoArgs(target, torch_.is_neg)).get() != Py_False) return false;
  plain->type = is_float ? ScalarType::Float : ScalarType::BFloat16;
  plain->rows = rows, plain->C = C;
  plain->input = data_of(x), plain->target = static_cast<const int64_t*>(data_of(y));
  return true;
}

bool read_numbers(PyObject* ignore_index, PyObject* reduction, PyObject* smoothing,
                  PlainCrossEntropy* plain) {
  if (!PyLong_CheckExact(ignore_index) || !PyFloat_CheckExact(smoothing)) return false;
  int overflow = 0;
  plain->ignore_index = PyLong_AsLongLongAndOverflow(ignore_index, &overflow);
  plain->label_smoothing = PyFloat_AS_DOUBLE(smoothing);
  plain->reduction = static_cast<Reduction>(PyLong_AsLong(reduction));
  const bool known = plain->reduction == kMean || plain->reduction == kSum;
  return overflow == 0 && known && !(plain->label_smoothing > 1);
}

// A new tensor like `model`, and where its memory is; null where it is not what was asked for.
Ref empty_like(PyObject* model, int32_t ndim, void** data) {
  Ref made(PyObject_CallOneArg(torch_.empty_like, model));
  DlTensor t;
  if (!made || !view(made.get(), &t) || t.ndim != ndim) return Ref();
  *data = data_of(t);
  return made;
}

bool wants_gradient(PyObject* input) {
  return Ref(PyObject_GetAttr(input, torch_.requires_grad)).get() == Py_True &&
         call(torch_.is_grad_enabled).get() == Py_True;
}

bool run(const PlainCrossEntropy& plain) {
  // Elements that take long enough for other threads of Python to want their turn.
  const bool release = plain.rows * plain.C >= 16384;
  PyThreadState* state = release ? PyEval_SaveThread() : nullptr;
  bool done = true;
  try {
    cpu::cross_entropy_plain(plain);
  } catch (const std::exception&) {  // a target out of range: the op says which
    done = false;
  }
  if (release) PyEval_RestoreThread(state);
  return done;
}

// (loss, gradient or None), or null.
PyObject* plain_call(PyObject* const* args) {
  PlainCrossEntropy plain;
  PyObject* const input = args[0];
  if (!read_numbers(args[2], args[3], args[4], &plain) || somebody_watches()) return nullptr;
  if (!read_tensors(input, args[1], &plain)) return nullptr;
  plain.wide_loss =
      plain.type == ScalarType::Float ||
      Ref(PyObject_CallOneArg(torch_.is_autocast_enabled, torch_.cpu)).get() == Py_True;
  Ref loss =
      empty_like(plain.wide_loss ? torch_.float_scalar : torch_.bfloat16_scalar, 0, &plain.loss);
  if (!loss) return nullptr;
  plain.grad = nullptr;
  Ref grad;
  if (wants_gradient(input)) {
    grad = empty_like(input, 2, &plain.grad);
    if (!grad) return nullptr;
  }
  if (!run(plain)) return nullptr;
  return PyTuple_Pack(2, loss.get(), grad ? grad.get() : Py_None);
}

PyObject* cross_entropy_plain(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 5) {
    PyErr_SetString(PyExc_TypeError, "cross_entropy_plain: expected 5 arguments");
    return nullptr;
  }
  PyObject* result = available ? plain_call(args) : nullptr;
  if (result) return result;
  PyErr_Clear();
  Py_RETURN_NONE;
}

PyObject* is_one(PyObject*, PyObject* scalar) {
  DlTensor t;
  if (available && view(scalar, &t) && t.ndim == 0 && t.code == kDlFloat && t.bits == 32 &&
      Ref(PyObject_CallMethodNoArgs(scalar, torch_.is_neg)).get() == Py_False)
    return PyBool_FromLong(*static_cast<const float*>(data_of(t)) == 1.0f);
  PyErr_Clear();
  Py_RETURN_FALSE;
}

PyMethodDef methods[] = {
    {"cross_entropy_plain",
     reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(cross_entropy_plain)), METH_FASTCALL,
     "(input, target, ignore_index, reduction, label_smoothing) -> (loss, gradient or None) of the "
     "commonest arguments, None for all others."},
    {"is_one", is_one, METH_O,
     "Is this a float32 scalar on the CPU, and 1? False where that can't be told at once."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

void add_cross_entropy_calls(PyObject* module) {
  available = look_up();
  PyErr_Clear();
  PyModule_AddFunctions(module, methods);
}

}  // namespace fastcls
