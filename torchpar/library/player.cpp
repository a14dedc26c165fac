// SPDX-License-Identifier: MIT
// Play again what an operator's Python function did for tensors of the same layouts: a tape.
//
// Python records a tape at the first call with a layout (tape.py): the results that it allocates,
// the kernels that it launches, and the operators of PyTorch that it calls. Boxed kernels at the
// dispatch keys of a device and of its autograd play the tape for each further call. They outrank
// the Python registrations, which stay as the slow path, and as all that compilers see.
//
//     autograd key   anything unusual, or a layout that is new → Python's rule
//                    a gradient is needed → a node of the graph, around the next line
//                    redispatch to the device's key, where somebody else's kernel may be
//     device key     a tape for this layout → play it, else → Python's function, which is recorded
//     backward       grad mode is off, plain gradients, a tape → play it, else → Python's rule

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ScalarOps.h>
#include <ATen/autocast_mode.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/DeviceGuard.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/csrc/jit/python/pybind_utils.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <array>
#include <atomic>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <unordered_map>

namespace py = pybind11;
using at::Tensor;
using c10::DispatchKeySet;
using c10::IValue;
using c10::OperatorHandle;
using torch::autograd::Node;
using torch::autograd::variable_list;
using torch::jit::Stack;

// Up to torch 2.13 shared pointers own nodes. This deleter frees long graphs without recursion.
namespace torch::autograd {
void deleteNode(Node*);
}

namespace {

// The driver's structures, whose header needs a toolkit: CUlaunchAttribute and CUlaunchConfig.
struct Attribute {
  int id;
  char padding[4];
  char value[64];
};
struct Config {
  unsigned grid[3], block[3], shared;
  void* stream;
  Attribute* attributes;
  unsigned count;
};
using Launch = int (*)(const Config*, void* function, void** parameters, void** extra);
using CurrentStream = int (*)(int32_t device, void** stream);

Launch launch_kernel = nullptr;  // cuLaunchKernelEx, or a stand-in
CurrentStream current_stream = nullptr;
uint64_t other_keys = ~0ull;  // the keys with which a call is not plain
PyObject* triton_runtime = nullptr;  // triton.knobs.runtime, which has the hooks of launches
std::atomic<uint64_t> played{0}, missed{0};
constexpr const char* kOperatorCapsule = "torchpar operator";

// -- Keys ------------------------------------------------------------------------------------

// All that a check, or a rule, may look at in the arguments of a call.
class Key {
 public:
  void add(int64_t word) { words_.push_back(word); }
  void add(const Tensor& t) {
    if (!t.defined()) return add(kNone);
    const auto* impl = t.unsafeGetTensorImpl();
    const auto device = impl->device();
    const auto address = reinterpret_cast<uintptr_t>(impl->data());
    add(t.dim() | static_cast<int64_t>(t.scalar_type()) << 8 |
        static_cast<int64_t>(device.type()) << 16 | static_cast<int64_t>(device.index() & 255) << 24 |
        static_cast<int64_t>(address & 15) << 32 |
        static_cast<int64_t>(t.requires_grad()) << 36 |
        static_cast<int64_t>(t.is_inference()) << 37 | first_of(impl) << 40);
    for (auto size : t.sizes()) add(size);
    for (auto stride : t.strides()) add(stride);
  }
  void add(const IValue& value) {
    if (value.isTensor())
      add(value.toTensor());
    else if (value.isNone())
      add(kNone);
    else if (value.isBool()) {
      add(kBool);
      add(value.toBool());
    } else if (value.isInt()) {
      add(kInt);
      add(value.toInt());
    } else if (value.isDouble()) {
      const double number = value.toDouble();
      int64_t bits;
      memcpy(&bits, &number, 8);
      add(kDouble);
      add(bits);
    } else if (value.isString()) {
      const auto& text = value.toStringRef();
      add(kString);
      add(static_cast<int64_t>(text.size()));
      for (size_t i = 0; i < text.size(); i += 8) {
        int64_t word = 0;
        memcpy(&word, text.data() + i, std::min<size_t>(8, text.size() - i));
        add(word);
      }
    } else
      fits_ = false;
  }
  // What PyTorch keeps beside the arguments, and a rule reads.
  void add_settings() {
    const auto& context = at::globalContext();
    add(static_cast<int64_t>(
            context.float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL)) |
        static_cast<int64_t>(c10::InferenceMode::is_enabled()) << 8 |
        static_cast<int64_t>(context.deterministicAlgorithms()) << 9 |
        static_cast<int64_t>(c10::typeMetaToScalarType(at::get_default_dtype())) << 16);
  }
  bool fits() const { return fits_; }
  std::string bytes() const {
    return {reinterpret_cast<const char*>(words_.data()), 8 * words_.size()};
  }
  bool operator==(const Key& other) const { return words_ == other.words_; }
  size_t hash() const {
    uint64_t h = words_.size();
    for (const int64_t word : words_) {
      h = (h ^ static_cast<uint64_t>(word)) * 0x9E3779B97F4A7C15ull;
      h ^= h >> 29;
    }
    return h;
  }

 private:
  // The number of the first argument that is this very tensor: a function may compare them.
  int64_t first_of(const c10::TensorImpl* impl) {
    if (tensors_.size() < kFew) {
      for (size_t i = 0; i < tensors_.size(); i++)
        if (tensors_[i] == impl) return static_cast<int64_t>(i);
      tensors_.push_back(impl);
      return static_cast<int64_t>(tensors_.size()) - 1;
    }
    if (many_.empty())
      for (size_t i = 0; i < kFew; i++) many_.emplace(tensors_[i], i);
    return many_.emplace(impl, static_cast<int64_t>(many_.size())).first->second;
  }
  // Before each value its kind, which no first word of a tensor is.
  enum Kind : int64_t { kNone = -1, kBool = -2, kInt = -3, kDouble = -4, kString = -5 };
  static constexpr size_t kFew = 16;
  c10::SmallVector<int64_t, 96> words_;
  c10::SmallVector<const c10::TensorImpl*, kFew> tensors_;
  std::unordered_map<const c10::TensorImpl*, int64_t> many_;  // once there are more
  bool fits_ = true;
};

struct Hash {
  size_t operator()(const Key& key) const { return key.hash(); }
};

// A reference to an object of Python, which ends with the interpreter's lock.
using Owned = std::shared_ptr<PyObject>;

Owned own(const py::object& object) {
  if (object.is_none()) return nullptr;
  return Owned(object.inc_ref().ptr(), [](PyObject* one) {
    if (!Py_IsInitialized()) return;
    py::gil_scoped_acquire gil;
    Py_DECREF(one);
  });
}

// -- Tapes -----------------------------------------------------------------------------------

struct Parameter {
  int slot;        // the tensor whose address is meant; kConstant; or kNumber and less
  int64_t number;  // bytes from that address, or the constant's bits
  // The numbers that a call brings follow downwards from kNumber.
  static constexpr int kConstant = -1, kNumber = -2;
};

using Numbers = std::vector<int64_t>;  // which differ from call to call
using Slots = c10::SmallVector<Tensor, 8>;  // the tensors of a tape, by their numbers

struct Step {
  enum Kind { EMPTY, VIEW, LAUNCH, CALL, FREE } kind;
  int slot = -1;  // EMPTY, VIEW: the tensor that is made
  int base = -1;  // VIEW: of which tensor
  int64_t offset = 0;
  std::vector<int64_t> sizes, strides;
  at::ScalarType dtype = at::kFloat;
  c10::Device device = at::kCPU;
  // LAUNCH
  void* function = nullptr;
  Config config{};
  std::vector<Parameter> parameters;
  Owned kept;    // Triton's compiled kernel, whose end would unload the function
  Owned hooks;   // the kernel's own, a list
  Owned python;  // a launch by Triton's launcher, called with the tensors of `slots`
  std::vector<int> slots;  // and the tensors that FREE drops
  // CALL
  std::optional<OperatorHandle> op;
  Stack arguments;
  std::vector<std::pair<int, int>> tensors;             // place among the arguments, slot
  std::vector<std::pair<int, std::vector<int>>> lists;  // the same for lists of tensors
  std::vector<int> results;  // a slot for each, or -1; those of a list one after the other
};

struct Tape {
  int slots = 0;  // the tensors that are given come first
  std::vector<Step> steps;
  std::vector<int> results;  // -1: None
  c10::Device device = at::kCPU;
  std::vector<int> written;  // of the tensors that are given
};

struct Operator;

// How autograd differentiates a call with tensors of these layouts. Derivatives are never freed,
// since graphs point to them.
struct Derivative {
  Operator* self;
  size_t tensors;          // how many of the arguments are tensors
  std::vector<int> saved;  // numbers of the tensors among the arguments, then of results; -1: None
  PyObject* rule;          // (saved, needs, grads): Python's rule, a gradient for each tensor
  PyObject* record;        // the same, and remember a tape
};

struct Entry {
  std::shared_ptr<const Tape> tape;        // none: Python computes
  const Derivative* derivative = nullptr;  // none: Python differentiates
  bool is_known = false;    // whether a further call is not recorded
  bool is_settled = false;  // whether it is known how a further call is differentiated
};

struct Table {
  std::unordered_map<Key, Entry, Hash> entries;
  std::shared_mutex mutex;
  Entry find(const Key& key) {
    if (!key.fits()) return {};
    std::shared_lock lock(mutex);
    auto found = entries.find(key);
    return found == entries.end() ? Entry{} : found->second;
  }
  // What is replaced ends after the lock: it may end objects of Python, which may wait for others.
  void keep(const Key& key, Entry entry) {
    std::unordered_map<Key, Entry, Hash> replaced;
    std::unique_lock lock(mutex);
    if (entries.size() >= kMost) replaced.swap(entries);
    std::swap(entries[key], entry);
    lock.unlock();
  }
  void settle(const Key& key, const Derivative* derivative) {
    std::unique_lock lock(mutex);
    auto found = entries.find(key);
    if (found == entries.end()) return;
    found->second.derivative = derivative;
    found->second.is_settled = true;
  }
  void clear() {
    std::unordered_map<Key, Entry, Hash> replaced;
    std::unique_lock lock(mutex);
    replaced.swap(entries);
    lock.unlock();
  }
  static constexpr size_t kMost = 4096;
};

Tensor make_empty(const Step& step) {
  if (step.device.is_cuda())
    return at::detail::empty_strided_generic(
        step.sizes, step.strides, at::detail::getCUDAHooks().getCUDADeviceAllocator(),
        DispatchKeySet(c10::DispatchKey::CUDA), step.dtype);
  return at::detail::empty_strided_cpu(step.sizes, step.strides, step.dtype);
}

// A tensor of the memory of another one, which autograd takes for no view of it.
Tensor make_view(const Step& step, const Tensor& base) {
  auto t = at::detail::make_tensor<c10::TensorImpl>(
      c10::TensorImpl::VIEW, c10::Storage(base.storage()), base.key_set(),
      c10::scalarTypeToTypeMeta(step.dtype));
  auto* impl = t.unsafeGetTensorImpl();
  const int64_t start = base.storage_offset() * static_cast<int64_t>(base.element_size());
  impl->set_storage_offset((start + step.offset) / static_cast<int64_t>(t.element_size()));
  impl->set_sizes_and_strides(step.sizes, step.strides);
  return t;
}

// Whether a hook of Triton's is a function, or a chain of hooks that has one.
bool has_calls(PyObject* name) {
  static PyObject* const calls = PyUnicode_InternFromString("calls");
  auto hook = py::reinterpret_steal<py::object>(PyObject_GetAttr(triton_runtime, name));
  if (!hook) throw py::error_already_set();
  if (hook.is_none()) return false;
  auto functions = py::reinterpret_steal<py::object>(PyObject_GetAttr(hook.ptr(), calls));
  if (!functions) PyErr_Clear();  // a function of its own
  return !functions || py::len(functions) > 0;
}

// Whether somebody watches all launches by Triton's hooks. The caller has the interpreter's lock.
bool has_hooks() {
  // Names that are made once: this is a part of each call.
  static PyObject *const enter = PyUnicode_InternFromString("launch_enter_hook"),
                  *const leave = PyUnicode_InternFromString("launch_exit_hook");
  return triton_runtime && (has_calls(enter) || has_calls(leave));
}

// The answer of `has_hooks`, taken while a call of this thread still held the interpreter's lock:
// the call's tape need not take the lock again. Python that runs later may change the hooks, so
// that the answer holds once, and `call_python` resets it.
struct HooksOfCall {
  explicit HooksOfCall(std::optional<bool> now) : before(answer) { answer = now; }
  ~HooksOfCall() { answer = before; }
  const std::optional<bool> before;
  static thread_local std::optional<bool> answer;
};
thread_local std::optional<bool> HooksOfCall::answer;

// Whether somebody watches launches by Triton's hooks, or by those of a kernel of the tape.
bool is_watched(const Tape* tape) {
  if (tape)
    for (const auto& step : tape->steps)  // to read a list's length needs no lock
      if (step.hooks && PyList_GET_SIZE(step.hooks.get()) > 0) return true;
  if (!triton_runtime) return false;
  if (const auto answer = std::exchange(HooksOfCall::answer, std::nullopt)) return *answer;
  py::gil_scoped_acquire gil;
  return has_hooks();
}

// Launch; false where the thread has no context of the device yet.
bool launch(
    const Step& step, const Slots& slots, c10::Device device, const Numbers& numbers) {
  if (step.python) {
    py::gil_scoped_acquire gil;
    py::tuple tensors(step.slots.size());
    for (size_t i = 0; i < step.slots.size(); i++) tensors[i] = py::cast(slots[step.slots[i]]);
    py::reinterpret_borrow<py::function>(step.python.get())(numbers, *tensors);
    return true;
  }
  // As Triton, which launches no empty grid.
  if (!step.config.grid[0] || !step.config.grid[1] || !step.config.grid[2]) return true;
  int64_t values[64];
  void* pointers[64];
  const size_t count = step.parameters.size();
  for (size_t i = 0; i < count; i++) {
    const auto& p = step.parameters[i];
    values[i] = p.number;
    if (p.slot <= Parameter::kNumber) values[i] = numbers[Parameter::kNumber - p.slot];
    if (p.slot >= 0)
      values[i] += reinterpret_cast<int64_t>(slots[p.slot].unsafeGetTensorImpl()->data());
    pointers[i] = &values[i];
  }
  Config config = step.config;
  if (current_stream && device.is_cuda())
    TORCH_CHECK(current_stream(device.index(), &config.stream) == 0, "there is no current stream");
  const int error = launch_kernel(&config, step.function, pointers, nullptr);
  if (error == 201) return false;  // CUDA_ERROR_INVALID_CONTEXT
  TORCH_CHECK(error == 0, "cuLaunchKernelEx: error ", error, " of the driver");
  return true;
}

// Play a tape for the tensors among ``slots``; false if a launch was refused.
bool play(const Tape& tape, Slots& slots, const Numbers& numbers = {}) {
  c10::OptionalDeviceGuard guard(tape.device);
  at::AutoDispatchBelowADInplaceOrView below;
  slots.resize(tape.slots);
  for (const auto& step : tape.steps) switch (step.kind) {
      case Step::EMPTY:
        slots[step.slot] = make_empty(step);
        break;
      case Step::VIEW:
        slots[step.slot] = make_view(step, slots[step.base]);
        break;
      case Step::LAUNCH:
        if (!launch(step, slots, tape.device, numbers)) return false;
        break;
      case Step::FREE:
        for (int slot : step.slots) slots[slot] = Tensor();
        break;
      case Step::CALL: {
        Stack stack = step.arguments;
        for (auto [place, slot] : step.tensors) stack[place] = slots[slot];
        for (const auto& [place, numbers] : step.lists) {
          c10::List<Tensor> list;
          list.reserve(numbers.size());
          for (int slot : numbers) list.push_back(slots[slot]);
          stack[place] = std::move(list);
        }
        step.op->callBoxed(stack);
        auto slot = step.results.begin();
        auto keep = [&](Tensor&& t) {
          if (*slot >= 0) slots[*slot] = std::move(t);
          ++slot;
        };
        for (auto& value : stack)
          if (value.isTensorList())
            for (Tensor t : value.toTensorList()) keep(std::move(t));
          else
            keep(std::move(value).toTensor());
      }
    }
  for (int slot : tape.written)
    if (!slots[slot].is_inference()) slots[slot].unsafeGetTensorImpl()->bump_version();
  played++;
  return true;
}

// -- Operators -------------------------------------------------------------------------------

struct Operator {
  std::string name;
  std::string node_name;  // which errors and `grad_fn` show
  bool asks_first;    // whether Python's rule may call something else than the operator
  PyObject* rule;     // (keyset, *args, **kwargs): Python's kernel of the key Autograd
  PyObject* compute;  // (*args, **kwargs): Python's kernel of the device's key
  PyObject* record;   // the same, and remember a tape
  PyObject* observe;  // as `rule`, for a call that is differentiated, and settle how
  Table forward, gradients;
  std::atomic<bool> is_recorded{true};  // false: Python computes what has no tape
};

// Call Python. Its errors pass through autograd's threads as PyTorch's own do.
template <class F>
void raising_in_python(const F& f) {
  try {
    f();
  } catch (py::error_already_set& e) {
    e.restore();
    python_error error;
    error.persist();
    throw error;  // NOLINT: as PyTorch throws it
  }
}

struct Arguments {
  py::list positional;
  py::dict keywords;
};

// The arguments on the stack as Python gets them: without those at their defaults.
Arguments to_python(const c10::FunctionSchema& schema, c10::ArrayRef<IValue> values) {
  Arguments found;
  const auto& arguments = schema.arguments();
  size_t positional = 0, given = 0;
  auto is_default = [&](size_t i) {
    const auto& fallback = arguments[i].default_value();
    return fallback && !values[i].isTensor() && *fallback == values[i];
  };
  for (; positional < arguments.size() && !arguments[positional].kwarg_only(); positional++)
    if (!is_default(positional)) given = positional + 1;
  for (size_t i = 0; i < given; i++) found.positional.append(torch::jit::toPyObject(values[i]));
  for (size_t i = positional; i < arguments.size(); i++)
    if (!is_default(i))
      found.keywords[arguments[i].name().c_str()] = torch::jit::toPyObject(values[i]);
  return found;
}

// Replace the arguments on the stack by Python's results.
void push_results(const c10::FunctionSchema& schema, Stack& stack, const py::object& result) {
  torch::jit::drop(stack, schema.arguments().size());
  const auto& returns = schema.returns();
  if (returns.size() == 1)
    stack.push_back(torch::jit::toIValue(result, returns[0].real_type()));
  else
    for (size_t i = 0; i < returns.size(); i++)
      stack.push_back(
          torch::jit::toIValue(result[py::int_(i)].cast<py::object>(), returns[i].real_type()));
}

void call_python(
    PyObject* function, const OperatorHandle& op, Stack& stack,
    std::optional<DispatchKeySet> keyset = std::nullopt) {
  const auto& schema = op.schema();
  const HooksOfCall hooks{std::nullopt};
  py::gil_scoped_acquire gil;
  auto found = to_python(schema, torch::jit::last(stack, schema.arguments().size()));
  auto f = py::reinterpret_borrow<py::function>(function);
  raising_in_python([&] {
    py::object result = keyset ? f(*keyset, *found.positional, **found.keywords)
                               : f(*found.positional, **found.keywords);
    push_results(schema, stack, result);
  });
}

Key key_of(c10::ArrayRef<IValue> values) {
  Key key;
  key.add_settings();
  for (const auto& value : values) key.add(value);
  return key;
}

// Whether PyTorch's operators would do more than they did when the tape was recorded.
bool is_unusual(c10::DeviceType device) {
  const auto& context = at::globalContext();
  return at::autocast::is_autocast_enabled(device) ||
         (context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory());
}

// Whether a tape may be played, or recorded, for a call with these arguments.
bool may_play(c10::ArrayRef<IValue> values, const Tape* tape) {
  bool has_tensor = false;
  for (const auto& value : values)
    if (value.isTensor() && value.toTensor().defined()) {
      if (is_unusual(value.toTensor().device().type())) return false;
      has_tensor = true;
    }
  return has_tensor && !is_watched(tape);
}

// The kernel of a device's key.
struct Device : c10::OperatorKernel {
  explicit Device(Operator* self) : self(self) {}
  void operator()(const OperatorHandle& op, DispatchKeySet, Stack* stack) {
    const auto values = torch::jit::last(*stack, op.schema().arguments().size());
    const auto key = key_of(values);
    const auto entry = self->forward.find(key);
    const bool is_usual = may_play(values, entry.tape.get());
    if (entry.tape && is_usual) {
      Slots slots;
      for (const auto& value : values)
        if (value.isTensor() && value.toTensor().defined()) slots.push_back(value.toTensor());
      if (play(*entry.tape, slots)) {
        torch::jit::drop(*stack, values.size());
        for (int slot : entry.tape->results) stack->emplace_back(slots[slot]);
        return;
      }
    }
    missed++;
    const bool records = is_usual && key.fits() && !entry.is_known && self->is_recorded;
    call_python(records ? self->record : self->compute, op, *stack);
  }
  Operator* self;
};

// The object of Python that a tensor has, or null. PyTorch 2.11 has another name for it.
template <class Slot>
PyObject* object_of(const Slot* slot) {
  if constexpr (requires { slot->load_pyobj(); })
    return slot->load_pyobj();
  else
    return slot->check_pyobj().value_or(nullptr);
}

// Whether a gradient is a plain tensor of a device, which no mode or subclass intercepts, and has
// no derivative of forward mode. The keys
// do not tell of a subclass that has __torch_function__ alone.
bool is_plain(const Tensor& t) {
  PyObject* object = object_of(t.unsafeGetTensorImpl()->pyobj_slot());
  if (object && !THPVariable_CheckExact(object)) return false;
  if (torch::autograd::isFwGradDefined(t)) return false;
  const auto local = c10::impl::tls_local_dispatch_key_set();
  const auto keys =
      (t.key_set() | local.included_) - local.excluded_ -
      DispatchKeySet({c10::DispatchKey::ADInplaceOrView, c10::DispatchKey::BackendSelect});
  return !(keys.raw_repr() & other_keys);
}

Key key_of_backward(
    const Derivative& derivative, int64_t needs, const variable_list& grads,
    const variable_list& saved) {
  Key key;
  key.add_settings();
  key.add(reinterpret_cast<int64_t>(&derivative));
  key.add(needs);
  for (const auto& g : grads) key.add(g);
  for (const auto& t : saved) key.add(t);
  return key;
}

constexpr bool kNodesCount = std::is_base_of_v<c10::intrusive_ptr_target, Node>;

template <class T, class... Args>
auto make_node(Args&&... args) {
  if constexpr (kNodesCount)
    return c10::make_intrusive<T>(std::forward<Args>(args)...);
  else
    return std::shared_ptr<T>(new T(std::forward<Args>(args)...), torch::autograd::deleteNode);
}

// The node of a played call in autograd's graph. It takes half of the time of an
// autograd::Function.
struct PlayedBackward : Node {
  PlayedBackward(const Derivative& derivative, torch::autograd::edge_list edges)
      : Node(std::move(edges)), derivative(derivative) {}
  std::string name() const override { return derivative.self->node_name; }

  variable_list apply(variable_list&& grads) override {
    if (!std::all_of(grads.begin(), grads.end(), [](const auto& g) { return g.defined(); }))
      fill_zeros(grads, metadata());
    return gradients(derivative, grads, unpacked(), needs());
  }
  void release_variables() override {
    std::lock_guard lock(mutex_);
    for (auto& one : saved) one.reset_data();
  }

  // Compiled autograd traces `apply_packed` with fake tensors. No tape takes those, so Python's
  // rule is traced.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    args.collect(reinterpret_cast<uint64_t>(&derivative));
    for (size_t i = 0; i < saved.size(); i++) args.collect(saved[i], is_result(i));
    for (uint32_t i = 0; i < num_inputs(); i++)
      if (args.cond(has_metadata(i))) args.collect(input_metadata(i));
  }
  variable_list apply_with_saved(
      const variable_list& grads, torch::dynamo::autograd::SwapSavedVariables& swap) override {
    using namespace torch::dynamo::autograd;
    for (auto& one : saved) swap.before(one);
    for (uint32_t i = 0; i < num_inputs(); i++)
      if (has_metadata(i)) swap.before(mutable_input_metadata(i));
    PackedArgs packed;
    packed.pack(reinterpret_cast<int64_t>(&derivative));
    packed.pack(needs());
    packed.pack(metadata());
    packed.pack(unpacked());
    std::vector<at::TypePtr> types;
    for (const auto& value : packed.vec()) types.push_back(value.type());
    const auto& compiler = getPyCompilerInterface();
    const auto function =
        compiler->bind_function(swap.get_py_compiler(), name(), apply_packed, types, true, true);
    auto result = compiler->call_function(
        swap.get_py_compiler(), "apply_functional", function, grads, packed.vec(),
        IValuePacker<Metadata>::pack(get_input_metadata(next_edges())));
    for (auto& one : saved) swap.after(one);
    for (uint32_t i = 0; i < num_inputs(); i++)
      if (has_metadata(i)) swap.after(mutable_input_metadata(i));
    return result;
  }
  static variable_list apply_packed(const variable_list& given, const std::vector<IValue>& packed) {
    torch::dynamo::autograd::PackedArgs args(packed);
    const auto& derivative = *reinterpret_cast<const Derivative*>(args.unpack<int64_t>());
    const auto needs = args.unpack<int64_t>();
    auto grads = given;
    fill_zeros(grads, args.unpack<Metadata>());
    return gradients(derivative, grads, args.unpack<variable_list>(), needs);
  }

  bool is_result(size_t i) const {
    return derivative.saved[i] >= static_cast<int>(derivative.tensors);
  }

  const Derivative& derivative;
  std::vector<torch::autograd::SavedVariable> saved;

 private:
  using Metadata = std::vector<std::optional<torch::autograd::InputMetadata>>;
  bool has_metadata(uint32_t i) const { return !input_metadata(i).was_default_constructed(); }
  Metadata metadata() const {
    Metadata inputs;
    for (uint32_t i = 0; i < num_inputs(); i++)
      if (has_metadata(i))
        inputs.emplace_back(input_metadata(i));
      else
        inputs.emplace_back();  // of an undefined result
    return inputs;
  }
  // Zeros for results without a gradient.
  static void fill_zeros(variable_list& grads, const Metadata& metadata) {
    for (size_t i = 0; i < grads.size(); i++)
      if (!grads[i].defined() && metadata[i]) grads[i] = metadata[i]->zeros_like();
  }
  variable_list unpacked() {
    std::lock_guard lock(mutex_);
    variable_list tensors;
    tensors.reserve(saved.size());
    for (const auto& one : saved) tensors.push_back(one.unpack(getptr()));
    return tensors;
  }
  int64_t needs() const {
    int64_t mask = 0;
    for (size_t i = 0; i < derivative.tensors; i++)
      mask |= int64_t{task_should_compute_output(i)} << i;
    return mask;
  }
  static variable_list gradients(
      const Derivative& derivative, const variable_list& grads, const variable_list& tensors,
      int64_t needs) {
    const size_t count = derivative.tensors;
    variable_list found(count);
    bool is_simple = !at::GradMode::is_enabled();
    for (const auto& g : grads) is_simple = is_simple && g.defined() && is_plain(g);
    for (const auto& t : tensors) is_simple = is_simple && (!t.defined() || is_plain(t));
    is_simple = is_simple && !is_unusual(grads[0].device().type());
    bool records = false;
    if (is_simple) {
      const auto key = key_of_backward(derivative, needs, grads, tensors);
      const auto entry = derivative.self->gradients.find(key);
      const bool may_launch = !is_watched(entry.tape.get());
      if (entry.tape && may_launch) {
        Slots slots;
        for (const auto& g : grads) slots.push_back(g);
        for (const auto& t : tensors)
          if (t.defined()) slots.push_back(t);
        if (play(*entry.tape, slots)) {
          for (size_t i = 0; i < count; i++)
            if (const int slot = entry.tape->results[i]; slot >= 0) found[i] = slots[slot];
          return found;
        }
      }
      missed++;
      records = may_launch && key.fits() && !entry.is_known && derivative.self->is_recorded;
    }
    py::gil_scoped_acquire gil;
    auto optional = [](const Tensor& t) { return t.defined() ? py::cast(t) : py::none(); };
    py::list saved_list, needs_list, grads_list;
    for (const auto& t : tensors) saved_list.append(optional(t));
    for (size_t i = 0; i < count; i++) needs_list.append(py::bool_(needs >> i & 1));
    for (const auto& g : grads) grads_list.append(optional(g));
    auto f = py::reinterpret_borrow<py::function>(records ? derivative.record : derivative.rule);
    raising_in_python([&] {
      py::sequence result = f(saved_list, needs_list, grads_list);
      for (size_t i = 0; i < count; i++)
        if (py::object g = result[i]; !g.is_none()) found[i] = py::cast<Tensor>(g);
    });
    return found;
  }
};

// Compute below autograd, and attach a node to the results on the stack.
void differentiate(
    const OperatorHandle& op, DispatchKeySet keyset, const Derivative& derivative, Stack& stack) {
  Slots tensors;
  for (const auto& value : torch::jit::last(stack, op.schema().arguments().size()))
    if (value.isTensor() && value.toTensor().defined()) tensors.push_back(value.toTensor());
  const at::TensorList given(tensors);
  auto node = make_node<PlayedBackward>(derivative, torch::autograd::collect_next_edges(given));
  const size_t returns = op.schema().returns().size();
  {
    c10::AutoGradMode no_grad(false);
    c10::AutoFwGradMode no_forward_grad(false);
    op.redispatchBoxed(keyset & c10::after_autograd_keyset, &stack);
    // Somebody else's kernel may return an argument, whose place in the graph must not change.
    for (size_t i = stack.size() - returns; i < stack.size(); i++)
      for (const auto& t : tensors)
        if (stack[i].toTensor().is_same(t)) stack[i] = t.view_as(t);
  }
  const auto results = torch::jit::last(stack, returns);
  for (const auto& value : results)
    if (const auto& t = value.toTensor(); !t.defined())
      node->add_input_metadata(Node::undefined_input());
    else if (torch::autograd::isDifferentiableType(t.scalar_type()))
      torch::autograd::set_history(t, node);
    else
      node->add_input_metadata(t);
  node->saved.reserve(derivative.saved.size());
  for (size_t i = 0; i < derivative.saved.size(); i++) {
    const int number = derivative.saved[i];
    if (number < 0)
      node->saved.emplace_back();
    else if (node->is_result(i))
      node->saved.emplace_back(results[number - tensors.size()].toTensor(), true);
    else
      node->saved.emplace_back(tensors[number], false);
  }
}

// The kernel of a device's key of autograd.
struct Autograd : c10::OperatorKernel {
  explicit Autograd(Operator* self) : self(self) {}
  void operator()(const OperatorHandle& op, DispatchKeySet keyset, Stack* stack) {
    const auto values = torch::jit::last(*stack, op.schema().arguments().size());
    bool is_simple = !(keyset.raw_repr() & other_keys), needs_grad = false;
    const bool records = at::GradMode::is_enabled();
    for (const auto& value : values) {
      if (!value.isTensor()) continue;
      const auto& t = value.toTensor();
      if (!t.defined()) continue;
      is_simple = is_simple && !torch::autograd::isFwGradDefined(t);
      needs_grad = needs_grad || (records && t.requires_grad());
    }
    if (is_simple && !needs_grad && !self->asks_first)
      return op.redispatchBoxed(keyset & c10::after_autograd_keyset, stack);
    bool observes = false;
    if (is_simple) {
      const auto key = key_of(values);
      const auto entry = self->forward.find(key);
      const bool may_be_settled = entry.is_known ? entry.tape && !entry.is_settled : key.fits();
      observes = needs_grad && may_be_settled && self->is_recorded;
      if (entry.tape && !needs_grad)
        return op.redispatchBoxed(keyset & c10::after_autograd_keyset, stack);
      if (entry.derivative) return differentiate(op, keyset, *entry.derivative, *stack);
    }
    call_python(observes ? self->observe : self->rule, op, *stack, keyset);
  }
  Operator* self;
};

// -- Python ----------------------------------------------------------------------------------

PyObject* keep(const py::object& object) { return object.is_none() ? nullptr : object.inc_ref().ptr(); }

// An argument of an operator. A number may stand for a tensor, as in `t * 2`.
IValue to_argument(const py::handle& value, const c10::TypePtr& type) {
  const bool is_number = PyBool_Check(value.ptr()) || PyLong_Check(value.ptr()) ||
                         PyFloat_Check(value.ptr()) || PyComplex_Check(value.ptr());
  if (!is_number || type->kind() != c10::TypeKind::TensorType)
    return torch::jit::toIValue(value, type);
  auto t = at::scalar_to_tensor(torch::jit::toIValue(value, c10::NumberType::get()).toScalar());
  t.unsafeGetTensorImpl()->set_wrapped_number(true);
  return t;
}

// A step as Python describes it: (kind, …).
Step to_step(const py::tuple& given) {
  Step step;
  const auto kind = given[0].cast<std::string>();
  if (kind == "empty" || kind == "view") {
    step.kind = kind == "empty" ? Step::EMPTY : Step::VIEW;
    step.slot = given[1].cast<int>();
    step.sizes = given[2].cast<std::vector<int64_t>>();
    step.strides = given[3].cast<std::vector<int64_t>>();
    step.dtype = given[4].cast<at::ScalarType>();
    if (step.kind == Step::EMPTY)
      step.device = given[5].cast<c10::Device>();
    else
      step.base = given[5].cast<int>(), step.offset = given[6].cast<int64_t>();
  } else if (kind == "launch") {
    step.kind = Step::LAUNCH;
    step.function = reinterpret_cast<void*>(given[1].cast<uintptr_t>());
    const auto grid = given[2].cast<std::array<unsigned, 3>>();
    std::copy(grid.begin(), grid.end(), step.config.grid);
    step.config.block[0] = given[3].cast<unsigned>();
    step.config.block[1] = step.config.block[2] = 1;
    step.config.shared = given[4].cast<unsigned>();
    for (auto [slot, number] : given[5].cast<std::vector<std::pair<int, int64_t>>>())
      step.parameters.push_back({slot, number});
    TORCH_CHECK(step.parameters.size() <= 64, "a kernel has more than 64 parameters");
    step.python = own(given[6].cast<py::object>());
    step.slots = given[7].cast<std::vector<int>>();
    step.kept = own(given[8].cast<py::object>());
    step.hooks = own(given[9].cast<py::list>());
  } else if (kind == "free") {
    step.kind = Step::FREE;
    step.slots = given[1].cast<std::vector<int>>();
  } else {
    step.kind = Step::CALL;
    step.op = c10::Dispatcher::singleton().findSchemaOrThrow(
        given[1].cast<std::string>().c_str(), given[2].cast<std::string>().c_str());
    const auto& arguments = step.op->schema().arguments();
    const auto values = given[3].cast<py::list>();
    for (size_t i = 0; i < arguments.size(); i++)
      step.arguments.push_back(to_argument(values[i], arguments[i].real_type()));
    step.tensors = given[4].cast<std::vector<std::pair<int, int>>>();
    step.lists = given[5].cast<std::vector<std::pair<int, std::vector<int>>>>();
    step.results = given[6].cast<std::vector<int>>();
  }
  return step;
}

std::shared_ptr<const Tape> to_tape(const py::object& given) {
  if (given.is_none()) return nullptr;
  auto tape = std::make_shared<Tape>();
  auto parts = given.cast<py::tuple>();
  tape->slots = parts[0].cast<int>();
  for (auto step : parts[1].cast<py::list>()) tape->steps.push_back(to_step(step.cast<py::tuple>()));
  tape->results = parts[2].cast<std::vector<int>>();
  tape->device = parts[3].cast<c10::Device>();
  tape->written = parts[4].cast<std::vector<int>>();
  return tape;
}

// Calls an operator with positional tensors, without PyTorch's parser of arguments in Python.
// Returns NotImplemented for other arguments, and where a mode or a tracer of Python wants calls.
PyObject* call_operator(PyObject* self, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  const auto& op =
      *static_cast<const OperatorHandle*>(PyCapsule_GetPointer(self, kOperatorCapsule));
  const auto& schema = op.schema();
  const auto& arguments = schema.arguments();
  bool is_plain = static_cast<size_t>(count) <= arguments.size() &&
                  !at::impl::torch_function_mode_enabled() && !torch::jit::tracer::isTracing();
  Slots held;  // until the lock is held again: to free a tensor's object of Python needs it
  Stack stack;
  stack.reserve(std::max(arguments.size(), schema.returns().size()));
  for (size_t i = 0; is_plain && i < arguments.size(); i++) {
    if (static_cast<Py_ssize_t>(i) >= count) {
      is_plain = arguments[i].default_value().has_value();
      if (is_plain) stack.push_back(*arguments[i].default_value());
    } else if (THPVariable_CheckExact(given[i]) && !arguments[i].kwarg_only()) {
      held.push_back(THPVariable_Unpack(given[i]));
      stack.emplace_back(held.back());
    } else {
      is_plain = false;
    }
  }
  if (!is_plain) return Py_NewRef(Py_NotImplemented);
  {
    const HooksOfCall hooks{has_hooks()};
    py::gil_scoped_release others;
    op.callBoxed(stack);
  }
  if (stack.size() == 1) return THPVariable_Wrap(stack[0].toTensor());
  py::tuple results(stack.size());
  for (size_t i = 0; i < stack.size(); i++)
    results[i] = py::reinterpret_steal<py::object>(THPVariable_Wrap(stack[i].toTensor()));
  return results.release().ptr();
  END_HANDLE_TH_ERRORS
}

PyMethodDef call_operator_method = {
    "call_operator", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(call_operator)),
    METH_FASTCALL, nullptr};

// An operator in front of Python's registrations, until it is removed.
class Installed {
 public:
  Installed(
      std::string space, std::string name, std::string overload, std::vector<std::string> devices,
      std::string node_name, bool asks_first, const py::object& rule, const py::object& compute,
      const py::object& record, const py::object& observe)
      : self_(new Operator{
            space + "::" + name, std::move(node_name), asks_first, keep(rule), keep(compute),
            keep(record), keep(observe)}),
        handle_(c10::Dispatcher::singleton().findSchemaOrThrow(
            self_->name.c_str(), overload.c_str())) {
    const auto full = overload.empty() ? name : name + "." + overload;
    for (const auto& device : devices) {
      add<Autograd>(space, full, "Autograd" + device);
      add<Device>(space, full, device);
    }
  }
  ~Installed() { remove(); }
  void remove() { libraries_.clear(); }

  // What the tables tell calls apart by; None where no tape is kept.
  py::object key(const py::tuple& values) const { return to_python(key_of(to_values(values))); }
  void remember(const py::tuple& values, const py::object& tape) {
    const auto key = key_of(to_values(values));
    if (key.fits()) self_->forward.keep(key, {to_tape(tape), nullptr, true});
  }
  void settle(const py::tuple& values, const Derivative* derivative) {
    self_->forward.settle(key_of(to_values(values)), derivative);
  }
  using Optional = std::vector<std::optional<Tensor>>;
  py::object backward_key(
      const Derivative* derivative, const std::vector<bool>& needs, const Optional& grads,
      const Optional& saved) const {
    return to_python(key_of_gradients(derivative, needs, grads, saved));
  }
  void remember_backward(
      const Derivative* derivative, const std::vector<bool>& needs, const Optional& grads,
      const Optional& saved, const py::object& tape) {
    const auto key = key_of_gradients(derivative, needs, grads, saved);
    if (key.fits()) self_->gradients.keep(key, {to_tape(tape), nullptr, true});
  }
  void stop_recording() { self_->is_recorded = false; }
  const Derivative* derivative(
      size_t tensors, std::vector<int> saved, const py::object& rule, const py::object& record) {
    return new Derivative{self_, tensors, std::move(saved), keep(rule), keep(record)};
  }
  py::object caller() const {
    auto* handle = new OperatorHandle(handle_);
    auto capsule = py::reinterpret_steal<py::object>(
        PyCapsule_New(handle, kOperatorCapsule, [](PyObject* one) {
          delete static_cast<OperatorHandle*>(PyCapsule_GetPointer(one, kOperatorCapsule));
        }));
    return py::reinterpret_steal<py::object>(PyCFunction_New(&call_operator_method, capsule.ptr()));
  }
  void forget() {
    self_->forward.clear();
    self_->gradients.clear();
  }

 private:
  template <class Kernel>
  void add(const std::string& space, const std::string& name, const std::string& key) {
    libraries_.emplace_back(
        torch::Library::IMPL, space, c10::parseDispatchKey(key), __FILE__, __LINE__);
    libraries_.back().impl(
        name.c_str(), torch::CppFunction::makeFromBoxedFunctor(std::make_unique<Kernel>(self_)));
  }
  static py::object to_python(const Key& key) {
    if (!key.fits()) return py::none();
    return py::bytes(key.bytes());
  }
  static Key key_of_gradients(
      const Derivative* derivative, const std::vector<bool>& needs, const Optional& grads,
      const Optional& saved) {
    int64_t mask = 0;
    for (size_t i = 0; i < needs.size(); i++) mask |= int64_t{needs[i]} << i;
    variable_list given, kept;
    for (const auto& g : grads) given.push_back(g.value_or(Tensor()));
    for (const auto& t : saved) kept.push_back(t.value_or(Tensor()));
    return key_of_backward(*derivative, mask, given, kept);
  }
  // All arguments of the schema, in its order.
  Stack to_values(const py::tuple& given) const {
    Stack values;
    const auto& arguments = handle_.schema().arguments();
    for (size_t i = 0; i < arguments.size(); i++)
      values.push_back(torch::jit::toIValue(given[i], arguments[i].real_type()));
    return values;
  }
  Operator* self_;  // never freed: graphs point to it
  OperatorHandle handle_;
  std::vector<torch::Library> libraries_;
};

// Tapes of functions of a list of tensors that are no operators.
class Memo {
 public:
  // The results, or whether the call may be recorded.
  py::object play(int64_t number, const py::list& given, const Numbers& numbers) {
    Slots slots;
    for (const auto& one : given) slots.push_back(THPVariable_Unpack(one.ptr()));
    if (slots.empty() || is_unusual(slots[0].device().type())) return py::bool_(false);
    for (const auto& t : slots)
      if (!is_plain(t)) return py::bool_(false);
    const auto key = key_of(number, slots);
    const auto entry = table_.find(key);
    if (!entry.tape) return py::bool_(!entry.is_known && !is_watched(nullptr));
    if (is_watched(entry.tape.get())) return py::bool_(false);
    bool is_played;
    {
      py::gil_scoped_release others;
      is_played = ::play(*entry.tape, slots, numbers);
    }
    if (!is_played) return py::bool_(false);
    py::list results(entry.tape->results.size());
    for (size_t i = 0; i < results.size(); i++)
      results[i] = py::cast(slots[entry.tape->results[i]]);
    return results;
  }
  void remember(int64_t number, const std::vector<Tensor>& given, const py::object& tape) {
    table_.keep(key_of(number, given), {to_tape(tape), nullptr, true});
  }
  void forget() { table_.clear(); }

 private:
  static Key key_of(int64_t number, at::TensorList given) {
    Key key;
    key.add_settings();
    key.add(number);
    for (const auto& t : given) key.add(t);
    return key;
  }
  Table table_;
};

}  // namespace

PYBIND11_MODULE(_player, m) {
  py::class_<Derivative, std::unique_ptr<Derivative, py::nodelete>>(m, "Derivative");
  py::class_<Installed>(m, "Installed")
      .def(py::init<
           std::string, std::string, std::string, std::vector<std::string>, std::string, bool,
           py::object, py::object, py::object, py::object>())
      .def("remove", &Installed::remove)
      .def("caller", &Installed::caller)
      .def("key", &Installed::key)
      .def("remember", &Installed::remember)
      .def("settle", &Installed::settle, py::arg("values"), py::arg("derivative").none(true))
      .def("backward_key", &Installed::backward_key)
      .def("remember_backward", &Installed::remember_backward)
      .def("stop_recording", &Installed::stop_recording)
      .def("derivative", &Installed::derivative, py::return_value_policy::reference)
      .def("forget", &Installed::forget);
  py::class_<Memo>(m, "Memo")
      .def(py::init<>())
      .def("play", &Memo::play)
      .def("remember", &Memo::remember)
      .def("forget", &Memo::forget);
  m.def("set_launch", [](uintptr_t address) { launch_kernel = reinterpret_cast<Launch>(address); });
  m.def("set_stream", [](uintptr_t address) {
    current_stream = reinterpret_cast<CurrentStream>(address);
  });
  m.def("set_other_keys", [](uint64_t keys) { other_keys = keys; });
  m.def("set_runtime", [](const py::object& runtime) {
    if (runtime.ptr() != triton_runtime) triton_runtime = keep(runtime);
  });
  m.def("counts", [] { return std::make_pair(played.load(), missed.load()); });
}
