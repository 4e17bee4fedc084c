// The Python module fcomm._native: the C interface of fcomm.h, function by function, without torch.
//
// A call through ctypes costs a microsecond, more than a small collective itself; METH_FASTCALL costs a tenth of that.
// Arguments come in the order of fcomm.h and are converted according to its types: pointers are ints (Tensor.data_ptr),
// blocks are (rows, width) or (rows, (width, ...)), a signature is (dtype, shape), a communicator is a capsule. The
// result is the status. The limited API is used throughout: one build serves every Python from 3.11 on.
#include <Python.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <tuple>
#include <utility>
#include <vector>

#include "fcomm.h"

namespace {

constexpr char kComm[] = "fcomm_comm";

// --- arguments ---------------------------------------------------------------------------------------------------

// One converter for each type in fcomm.h; it holds what the converted value points to. Errors stay in Python's error
// indicator, which is checked once, after all arguments are converted.
template <class T>
struct Argument;

template <>
struct Argument<int> {
  int value;
  explicit Argument(PyObject *o) : value(int(PyLong_AsLong(o))) {}
};

template <>
struct Argument<size_t> {  // also uint64_t: a tag, which may be any int
  size_t value;
  explicit Argument(PyObject *o) : value(size_t(PyLong_AsUnsignedLongLongMask(o))) {}
};

template <>
struct Argument<double> {
  double value;
  explicit Argument(PyObject *o) : value(PyFloat_AsDouble(o)) {}
};

template <class T>
struct Argument<T *> {
  T *value;
  explicit Argument(PyObject *o) : value(static_cast<T *>(PyLong_AsVoidPtr(o))) {}
};

template <>
struct Argument<fcomm_comm *> {
  fcomm_comm *value;
  explicit Argument(PyObject *o) : value(static_cast<fcomm_comm *>(PyCapsule_GetPointer(o, kComm))) {}
};

template <>
struct Argument<const fcomm_comm *> : Argument<fcomm_comm *> {
  using Argument<fcomm_comm *>::Argument;
};

template <>
struct Argument<fcomm_blocks> {
  fcomm_blocks value{};
  std::vector<size_t> widths;
  Argument(const Argument &) = delete;
  explicit Argument(PyObject *o) {
    PyObject *w = PyTuple_GetItem(o, 1);
    if (!w) return;
    value.rows = PyLong_AsSize_t(PyTuple_GetItem(o, 0));
    if (!PyTuple_Check(w)) {
      value.width = PyLong_AsSize_t(w);
      return;
    }
    for (Py_ssize_t k = 0; k < PyTuple_Size(w); ++k) widths.push_back(PyLong_AsSize_t(PyTuple_GetItem(w, k)));
    value.widths = widths.data();
  }
};

template <>
struct Argument<const fcomm_signature *> {
  fcomm_signature signature{};
  const fcomm_signature *value = &signature;
  Argument(const Argument &) = delete;
  explicit Argument(PyObject *o) {
    PyObject *dims = PyTuple_GetItem(o, 1);
    if (!dims) return;
    signature.dtype = int32_t(PyLong_AsLong(PyTuple_GetItem(o, 0)));
    signature.ndim = int32_t(PyTuple_Size(dims));
    for (Py_ssize_t k = 0; k < std::min<Py_ssize_t>(signature.ndim, FCOMM_MAX_DIMS); ++k)
      signature.dims[k] = PyLong_AsLongLong(PyTuple_GetItem(dims, k));
  }
};

bool has_count(Py_ssize_t got, std::size_t expected) {
  if (std::size_t(got) == expected) return true;
  PyErr_Format(PyExc_TypeError, "fcomm._native: %zd arguments where fcomm.h has %zu", got, expected);
  return false;
}

// An exception that a Python signal handler raised while the call waited takes precedence over any status.
PyObject *status_object(long status) { return PyErr_Occurred() ? nullptr : PyLong_FromLong(status); }

template <auto function>
struct Call;

template <class Result, class... A, Result (*function)(A...)>
struct Call<function> {
  static PyObject *fastcall(PyObject *, PyObject *const *args, Py_ssize_t n) {
    return has_count(n, sizeof...(A)) ? with(args, std::index_sequence_for<A...>{}) : nullptr;
  }

  template <std::size_t... I>
  static PyObject *with(PyObject *const *args, std::index_sequence<I...>) {
    std::tuple<Argument<A>...> converted(args[I]...);  // each is constructed in place: it may point into itself
    if (PyErr_Occurred()) return nullptr;
    Result result;
    Py_BEGIN_ALLOW_THREADS
    result = function(std::get<I>(converted).value...);
    Py_END_ALLOW_THREADS
    return status_object(long(result));
  }
};

// --- opening and failing -----------------------------------------------------------------------------------------

// Called a few times a second by a waiting call, without the GIL: this is where Ctrl-C is noticed.
int interrupted() {
  const PyGILState_STATE state = PyGILState_Ensure();
  const int raised = PyErr_CheckSignals();
  PyGILState_Release(state);
  return raised;
}

PyObject *failed(fcomm_status s) {
  if (s == FCOMM_SYSTEM) return PyErr_SetFromErrno(PyExc_OSError);
  return PyErr_Format(PyExc_ValueError, "fcomm._native: status %d: the region is not of this version and size", int(s));
}

void free_comm(PyObject *capsule) {
  PyObject *type, *value, *traceback;  // of an exception that may be propagating while objects are destroyed
  PyErr_Fetch(&type, &value, &traceback);
  if (auto *comm = static_cast<fcomm_comm *>(PyCapsule_GetPointer(capsule, kComm))) fcomm_free(comm);
  if (PyErr_Occurred()) PyErr_WriteUnraisable(capsule);  // Ctrl-C while it closed
  PyErr_Restore(type, value, traceback);
}

PyObject *format(PyObject *, PyObject *args) {
  int fd, size;
  unsigned long long nonce, first_round;
  if (!PyArg_ParseTuple(args, "iiKK", &fd, &size, &nonce, &first_round)) return nullptr;
  if (const fcomm_status s = fcomm_format(fd, size, nonce, uint32_t(first_round))) return failed(s);
  return PyLong_FromLong(0);
}

PyObject *open(PyObject *, PyObject *args) {
  int fd, rank, size;
  PyObject *life;
  unsigned long long nonce;
  double timeout_s;
  if (!PyArg_ParseTuple(args, "iiiO!Kd", &fd, &rank, &size, &PyTuple_Type, &life, &nonce, &timeout_s)) return nullptr;
  std::vector<int> fds;
  for (Py_ssize_t k = 0; k < PyTuple_Size(life); ++k) fds.push_back(int(PyLong_AsLong(PyTuple_GetItem(life, k))));
  if (PyErr_Occurred() || !has_count(PyTuple_Size(life), std::size_t(size))) return nullptr;
  fcomm_comm *comm = nullptr;
  fcomm_status s;
  Py_BEGIN_ALLOW_THREADS  // it touches every page of this rank's slots, which takes time
  s = fcomm_open(fd, rank, size, fds.data(), nonce, timeout_s, &comm);
  Py_END_ALLOW_THREADS
  if (s) return failed(s);
  return PyCapsule_New(comm, kComm, free_comm);
}

PyObject *recv(PyObject *, PyObject *const *args, Py_ssize_t n) {
  if (!has_count(n, 5)) return nullptr;
  const Argument<void *> out(args[0]);
  const Argument<size_t> nbytes(args[1]);
  const Argument<const fcomm_signature *> signature(args[2]);
  const Argument<int> source(args[3]);
  const Argument<fcomm_comm *> comm(args[4]);
  if (PyErr_Occurred()) return nullptr;
  fcomm_signature got{};
  fcomm_status s;
  Py_BEGIN_ALLOW_THREADS
  s = fcomm_recv(out.value, nbytes.value, &signature.signature, source.value, &got, comm.value);
  Py_END_ALLOW_THREADS
  if (PyErr_Occurred()) return nullptr;
  const Py_ssize_t ndim = std::clamp<Py_ssize_t>(got.ndim, 0, FCOMM_MAX_DIMS);  // a peer wrote it
  PyObject *dims = PyTuple_New(ndim);
  for (Py_ssize_t k = 0; dims && k < ndim; ++k) PyTuple_SetItem(dims, k, PyLong_FromLongLong(got.dims[k]));
  return dims ? Py_BuildValue("iiN", int(s), int(got.dtype), dims) : nullptr;
}

PyObject *failure(PyObject *, PyObject *capsule) {
  const Argument<fcomm_comm *> comm(capsule);
  if (!comm.value) return nullptr;
  fcomm_failure f;
  Py_BEGIN_ALLOW_THREADS
  f = fcomm_last_failure(comm.value);
  Py_END_ALLOW_THREADS
  return Py_BuildValue("iiiI", f.reason, f.culprit, f.reporter, f.round);
}

PyObject *describe(PyObject *, PyObject *args) {
  const char *text;
  PyObject *capsule;
  if (!PyArg_ParseTuple(args, "sO", &text, &capsule)) return nullptr;
  const Argument<fcomm_comm *> comm(capsule);
  if (!comm.value) return nullptr;
  Py_BEGIN_ALLOW_THREADS
  fcomm_describe(comm.value, text);
  Py_END_ALLOW_THREADS
  return PyLong_FromLong(0);
}

PyObject *description(PyObject *, PyObject *args) {
  int rank;
  double wait_s;
  PyObject *capsule;
  if (!PyArg_ParseTuple(args, "idO", &rank, &wait_s, &capsule)) return nullptr;
  const Argument<fcomm_comm *> comm(capsule);
  if (!comm.value) return nullptr;
  std::array<char, FCOMM_TEXT_BYTES> text{};
  int found;
  Py_BEGIN_ALLOW_THREADS
  found = fcomm_description(comm.value, rank, wait_s, text.data(), text.size());
  Py_END_ALLOW_THREADS
  // A peer wrote it, so it may not be text at all.
  return found ? PyUnicode_DecodeUTF8(text.data(), Py_ssize_t(std::strlen(text.data())), "replace")
               : PyUnicode_FromString("");
}

// --- outputs from the pool ---------------------------------------------------------------------------------------

// DLPack's version 0 structures (dlpack.h), the only way to give torch memory with a deleter without torch's headers.
struct DlTensor {
  void *data;
  struct { int32_t type, id; } device;  // type 1 is the CPU
  int32_t ndim;
  struct { uint8_t code, bits; uint16_t lanes; } dtype;
  int64_t *shape, *strides;  // no strides: contiguous
  uint64_t byte_offset;
};

struct DlManagedTensor {
  DlTensor tensor;
  void *context;
  void (*deleter)(DlManagedTensor *);
};

struct Output : DlManagedTensor {
  int64_t dims[FCOMM_MAX_DIMS];
};

// Called when the last tensor that shares the storage dies, on any thread, without the GIL.
void give_back(DlManagedTensor *output) {
  fcomm_pool_return(output->tensor.data);
  std::free(static_cast<Output *>(output));
}

void discard(PyObject *capsule) {  // torch renames it when it takes over the memory
  if (PyCapsule_IsValid(capsule, "dltensor"))
    give_back(static_cast<DlManagedTensor *>(PyCapsule_GetPointer(capsule, "dltensor")));
}

// pool_take(nbytes, kind, bits, shape) -> a DLPack capsule of that shape, whose elements have that kind and bits.
PyObject *pool_take(PyObject *, PyObject *const *args, Py_ssize_t n) {
  if (!has_count(n, 4)) return nullptr;
  const Argument<size_t> nbytes(args[0]);
  const Argument<int> kind(args[1]), bits(args[2]);
  const Py_ssize_t ndim = PyTuple_Size(args[3]);
  if (PyErr_Occurred()) return nullptr;
  if (ndim > FCOMM_MAX_DIMS) return PyErr_Format(PyExc_ValueError, "fcomm._native: %zd dims", ndim);
  auto *output = static_cast<Output *>(std::calloc(1, sizeof(Output)));
  if (!output) return PyErr_NoMemory();
  for (Py_ssize_t k = 0; k < ndim; ++k) output->dims[k] = PyLong_AsLongLong(PyTuple_GetItem(args[3], k));
  void *data = nullptr;
  if (!PyErr_Occurred()) {
    Py_BEGIN_ALLOW_THREADS
    data = fcomm_pool_take(nbytes.value);
    Py_END_ALLOW_THREADS
    if (!data) PyErr_NoMemory();
  }
  output->tensor = {data, {1, 0}, int32_t(ndim), {uint8_t(kind.value), uint8_t(bits.value), 1}, output->dims, nullptr, 0};
  output->deleter = give_back;
  PyObject *capsule = data ? PyCapsule_New(static_cast<DlManagedTensor *>(output), "dltensor", discard) : nullptr;
  if (!capsule) give_back(output);
  return capsule;
}

PyObject *pool_stats(PyObject *, PyObject *) {
  const fcomm_pool_report r = fcomm_pool_stats();
  return Py_BuildValue("{s:n,s:n,s:n,s:n,s:n,s:n}", "in_use_bytes", r.in_use_bytes, "idle_bytes", r.idle_bytes,
                       "limit_bytes", r.limit_bytes, "hits", r.hits, "misses", r.misses, "blocks_in_use",
                       r.blocks_in_use);
}

PyObject *pool_clear(PyObject *, PyObject *) { return PyLong_FromSize_t(fcomm_pool_clear()); }

PyObject *pool_set_limit(PyObject *, PyObject *size) {
  const Argument<size_t> nbytes(size);
  if (PyErr_Occurred()) return nullptr;
  fcomm_pool_set_limit(nbytes.value);
  return PyLong_FromLong(0);
}

// --- the module --------------------------------------------------------------------------------------------------

template <class F>
PyMethodDef method(const char *name, F *function, int flags) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), flags, nullptr};
}

template <auto function>
PyMethodDef fast(const char *name) {
  return method(name, Call<function>::fastcall, METH_FASTCALL);
}

PyMethodDef methods[] = {
    fast<fcomm_region_bytes>("region_bytes"),
    method("format", format, METH_VARARGS),
    method("open", open, METH_VARARGS),
    fast<fcomm_close>("close"),
    fast<fcomm_all_reduce>("all_reduce"),
    fast<fcomm_reduce>("reduce"),
    fast<fcomm_scan>("scan"),
    fast<fcomm_reduce_scatter>("reduce_scatter"),
    fast<fcomm_all_gather>("all_gather"),
    fast<fcomm_gather>("gather"),
    fast<fcomm_scatter>("scatter"),
    fast<fcomm_all_to_all>("all_to_all"),
    fast<fcomm_broadcast>("broadcast"),
    fast<fcomm_permute>("permute"),
    fast<fcomm_barrier>("barrier"),
    fast<fcomm_send>("send"),
    method("recv", recv, METH_FASTCALL),
    method("failure", failure, METH_O),
    method("describe", describe, METH_VARARGS),
    method("description", description, METH_VARARGS),
    fast<fcomm_behind>("behind"),
    fast<fcomm_pid>("pid"),
    fast<fcomm_round>("round"),
    method("pool_take", pool_take, METH_FASTCALL),
    method("pool_stats", pool_stats, METH_NOARGS),
    method("pool_clear", pool_clear, METH_NOARGS),
    method("pool_set_limit", pool_set_limit, METH_O),
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module{PyModuleDef_HEAD_INIT, "fcomm._native", "The shared-memory engine; see fcomm/csrc/fcomm.h.", -1,
                   methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__native() {
  fcomm_set_interrupt_hook(interrupted);
  PyObject *m = PyModule_Create(&module);
  if (m) PyModule_AddIntConstant(m, "ABI", FCOMM_ABI);
  return m;
}
