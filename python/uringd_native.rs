//! The ordinary request of the Python worker, from its frame to the frame of its answer, in one call.
//!
//! uringd_worker.py is the whole worker without this. What this does is `Channel.serve` and `Exchange.respond` there, for an
//! application that behaves: whatever it meets besides, it leaves as it found it, and says to Python how far it came. So a
//! rule of PEP 3333 and the words for breaking it exist once, in Python.
//!
//! build.rs compiles this file by itself, without std, into an extension module in the stable ABI of CPython 3.8, which
//! fits every later version with a GIL. uringd carries it and hands it to the zygote.
//!
//! Unsafe code, for it speaks to C. What makes it sound: all of it runs with the GIL held; every new reference is an [`Own`]
//! at once, every borrowed one lives in something owned or is used before any Python code can run; nothing is believed of an
//! object before its exact type was seen; and the memory that is written to, [`Scratch`], is used only between two calls that
//! can run Python code.
#![no_std]

use core::{
    cell::UnsafeCell,
    ffi::{CStr, c_char, c_int, c_long, c_ulong, c_void},
    mem::{self, ManuallyDrop},
    ptr::{NonNull, null, null_mut},
    slice,
};

/// The head that every object has, also in the stable ABI.
#[repr(C)]
pub struct Object {
    references: isize,
    kind: *mut Object,
}
/// Borrowed, or on its way to or from C.
type Ref = *mut Object;

#[repr(C)]
struct Method {
    name: *const c_char,
    function: *const c_void,
    flags: c_int,
    doc: *const c_char,
}
const ARGUMENTS: c_int = 1;
const KEYWORDS: c_int = 2;

#[repr(C)]
struct Definition {
    head: Object,
    reserved: [*mut c_void; 3],
    name: *const c_char,
    doc: *const c_char,
    state_bytes: isize,
    methods: *mut Method,
    hooks: [*mut c_void; 4],
}

unsafe extern "C" {
    static mut _Py_NoneStruct: Object;
    static mut _Py_TrueStruct: Object;
    static mut _Py_FalseStruct: Object;
    static mut PyUnicode_Type: Object;
    static mut PyBytes_Type: Object;
    static mut PyList_Type: Object;
    static mut PyTuple_Type: Object;
    static mut PyExc_AttributeError: Ref;
    fn Py_IncRef(object: Ref);
    fn Py_DecRef(object: Ref);
    fn PyModule_Create2(definition: *mut Definition, abi: c_int) -> Ref;
    fn PyCFunction_NewEx(method: *mut Method, own: Ref, module: Ref) -> Ref;
    fn PyCapsule_New(pointer: *mut c_void, name: *const c_char, destructor: *const c_void) -> Ref;
    fn PyCapsule_GetPointer(capsule: Ref, name: *const c_char) -> *mut c_void;
    fn PyMem_Malloc(bytes: usize) -> *mut c_void;
    fn PyArg_UnpackTuple(arguments: Ref, name: *const c_char, least: isize, most: isize, ...) -> c_int;
    fn PyTuple_Pack(count: isize, ...) -> Ref;
    fn PyTuple_Size(tuple: Ref) -> isize;
    fn PyTuple_GetItem(tuple: Ref, index: isize) -> Ref;
    fn PyList_Size(list: Ref) -> isize;
    fn PyList_GetItem(list: Ref, index: isize) -> Ref;
    fn PyList_Append(list: Ref, item: Ref) -> c_int;
    fn PyDict_SetItem(dict: Ref, key: Ref, value: Ref) -> c_int;
    fn PyDict_GetItemWithError(dict: Ref, key: Ref) -> Ref;
    fn PyBytes_FromStringAndSize(from: *const u8, bytes: isize) -> Ref;
    fn PyBytes_AsString(bytes: Ref) -> *mut u8;
    fn PyBytes_Size(bytes: Ref) -> isize;
    fn PyUnicode_FromStringAndSize(from: *const u8, bytes: isize) -> Ref;
    fn PyUnicode_InternInPlace(text: *mut Ref);
    fn PyUnicode_InternFromString(from: *const c_char) -> Ref;
    fn PyUnicode_GetLength(text: Ref) -> isize;
    fn PyUnicode_AsUCS4(text: Ref, to: *mut u32, room: isize, terminate: c_int) -> *mut u32;
    fn PyFloat_FromDouble(value: f64) -> Ref;
    fn PyLong_FromLong(value: c_long) -> Ref;
    fn PyLong_FromUnsignedLong(value: c_ulong) -> Ref;
    fn PyLong_AsUnsignedLong(int: Ref) -> c_ulong;
    fn PyLong_AsSsize_t(int: Ref) -> isize;
    fn PyType_GetFlags(kind: Ref) -> c_ulong;
    fn PyObject_GetAttr(object: Ref, name: Ref) -> Ref;
    fn PyObject_SetAttr(object: Ref, name: Ref, value: Ref) -> c_int;
    fn PyObject_Call(callable: Ref, arguments: Ref, keywords: Ref) -> Ref;
    fn PyObject_CallFunctionObjArgs(callable: Ref, ...) -> Ref;
    fn PyObject_GetIter(object: Ref) -> Ref;
    fn PyIter_Next(iterator: Ref) -> Ref;
    fn PyErr_Occurred() -> Ref;
    fn PyErr_Clear();
    fn PyErr_NoMemory() -> Ref;
    fn PyErr_ExceptionMatches(kind: Ref) -> c_int;
    fn PyErr_Fetch(kind: *mut Ref, value: *mut Ref, traceback: *mut Ref);
    fn PyErr_NormalizeException(kind: *mut Ref, value: *mut Ref, traceback: *mut Ref);
    fn PyException_SetTraceback(exception: Ref, traceback: Ref) -> c_int;
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    unsafe extern "C" {
        fn abort() -> !;
    }
    // SAFETY: abort(3) has no conditions.
    unsafe { abort() }
}

/// A reference that is ours to give back.
struct Own(NonNull<Object>);

impl Own {
    /// What a call returned that gives its caller a reference; `None`: it has set an exception.
    fn new(object: Ref) -> Option<Own> {
        NonNull::new(object).map(Own)
    }

    /// A reference of our own to an object that somebody else keeps alive meanwhile.
    unsafe fn to(object: Ref) -> Own {
        // SAFETY: the caller's object is alive.
        unsafe {
            Py_IncRef(object);
            Own(NonNull::new_unchecked(object))
        }
    }

    fn get(&self) -> Ref {
        self.0.as_ptr()
    }

    /// To C, which takes the reference over.
    fn give(self) -> Ref {
        ManuallyDrop::new(self).get()
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        // SAFETY: the reference is ours, and this is its last use.
        unsafe { Py_DecRef(self.get()) }
    }
}

fn none() -> Ref {
    &raw mut _Py_NoneStruct
}

fn bool(value: bool) -> Ref {
    if value { &raw mut _Py_TrueStruct } else { &raw mut _Py_FalseStruct }
}

/// What a call that returns -1 with an exception returned.
fn done(result: c_int) -> Option<()> {
    (result == 0).then_some(())
}

/// Whether the object is of this type and of no subclass, whose methods may be anything.
unsafe fn is(object: Ref, kind: *mut Object) -> bool {
    // SAFETY: the caller's object is alive.
    unsafe { (*object).kind == kind }
}

/// The bytes of an object whose type was seen to be `bytes`.
unsafe fn bytes_of<'a>(bytes: Ref) -> &'a [u8] {
    // SAFETY: a bytes object has so many bytes, and they never change. The caller keeps it.
    unsafe { slice::from_raw_parts(PyBytes_AsString(bytes), PyBytes_Size(bytes) as usize) }
}

/// What the worker is about to read of a frame.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    fn byte(&mut self) -> Option<u8> {
        Some(self.take(1)?[0])
    }

    fn u32(&mut self) -> Option<u32> {
        Some(u32::from_le_bytes(self.take(4)?.try_into().ok()?))
    }
}

/// A key of many environs, with its bytes: a string that need not be made, hashed and interned again.
struct Known {
    text: Option<Own>,
    length: usize,
    bytes: [u8; 32],
}

struct Scratch {
    known: [Known; 64],
    wide: [u32; 2048],
    /// The frame's header and head are put together here.
    head: [u8; 8192],
}

/// Attributes and keys, interned.
macro_rules! names {
    ($($name:ident: $text:literal,)*) => {
        struct Names {
            $($name: Own,)*
        }

        impl Names {
            fn new() -> Option<Names> {
                // SAFETY: the texts end with zero.
                let own = |text: &CStr| Own::new(unsafe { PyUnicode_InternFromString(text.as_ptr()) });
                Some(Names { $($name: own($text)?,)* })
            }
        }
    };
}

names! {
    raw_uri: c"RAW_URI",
    input: c"wsgi.input",
    id: c"id",
    started: c"started",
    rare: c"rare",
    begun: c"begun",
    ended: c"ended",
    remaining: c"remaining",
    may_wait: c"may_wait",
    close: c"close",
    class: c"__class__",
}

/// What a channel's `serve` works with. It is never freed: a channel lives as long as its worker.
struct Bound {
    exchange: Own,
    app: Own,
    statuses: Own,
    out: Own,
    make_input: Own,
    file_wrapper: Own,
    flush: Own,
    tidy: Own,
    start_response: Own,
    write: Own,
    places: Own,
    zero: Own,
    names: Names,
    scratch: UnsafeCell<Scratch>,
}

/// How far a request came that is Python's to finish.
#[derive(Default)]
struct Left {
    result: Option<Own>,
    iterator: Option<Own>,
    piece: Option<Own>,
}

const REQUEST: u32 = 1;
/// Of the worker's PLACES.
const PLACES: usize = 10;
const REQUEST_URI: usize = 4;
const REMOTE_PORT: usize = 6;
const HEADER_BYTES: usize = 12;
/// Header, and the length of the head.
const PREFIX_BYTES: usize = HEADER_BYTES + 4;
/// COPY_BYTES_MAX of the worker.
const COPY_BYTES_MAX: usize = 65536;
/// Py_TPFLAGS_LIST_SUBCLASS and Py_TPFLAGS_TUPLE_SUBCLASS.
const LIST_OR_TUPLE: c_ulong = 3 << 25;
const CAPSULE: &CStr = c"uringd";

// In all of these, `None` says that something is unusual or, if there is an exception, failed.
impl Scratch {
    unsafe fn interned(&mut self, bytes: &[u8]) -> Option<Own> {
        let hash = bytes.iter().fold(bytes.len() as u32, |hash, byte| (hash.rotate_left(5) ^ u32::from(*byte)).wrapping_mul(0x9e37_79b9));
        let known = &mut self.known[hash as usize >> 26];
        // SAFETY: the text is ours; interning replaces one owned reference by another.
        unsafe {
            if let Some(text) = &known.text
                && known.bytes.get(..known.length) == Some(bytes)
            {
                return Some(Own::to(text.get()));
            }
            let mut text = Own::new(PyUnicode_FromStringAndSize(bytes.as_ptr(), bytes.len() as isize))?.give();
            PyUnicode_InternInPlace(&mut text);
            let text = Own::new(text)?;
            if let Some(room) = known.bytes.get_mut(..bytes.len()) {
                room.copy_from_slice(bytes);
                known.length = bytes.len();
                known.text = Some(Own::to(text.get()));
            }
            Some(text)
        }
    }

    /// One value, in those of marshal's codes that uringd uses.
    unsafe fn value(&mut self, reader: &mut Reader<'_>) -> Option<Own> {
        let code = reader.byte()?;
        let length = match code {
            b'z' | b'Z' => usize::from(reader.byte()?),
            b'a' | b'u' => reader.u32()? as usize,
            // SAFETY: PyFloat_FromDouble has no conditions.
            b'g' => return Own::new(unsafe { PyFloat_FromDouble(f64::from_le_bytes(reader.take(8)?.try_into().ok()?)) }),
            _ => return None,
        };
        let bytes = reader.take(length)?;
        if code != b'u' && !bytes.is_ascii() {
            return None;
        }
        // SAFETY: the bytes are read during the call only.
        unsafe { if code == b'Z' { self.interned(bytes) } else { Own::new(PyUnicode_FromStringAndSize(bytes.as_ptr(), length as isize)) } }
    }

    /// Appends the text to the head, whose end is `at`, as latin-1; its new end.
    unsafe fn append(&mut self, at: usize, text: Ref) -> Option<usize> {
        // SAFETY: the text is a str, as is seen here, and of a length that fits into `wide`.
        let wide = unsafe {
            if !is(text, &raw mut PyUnicode_Type) {
                return None;
            }
            let length = PyUnicode_GetLength(text);
            let wide = self.wide.get_mut(..length as usize)?;
            if PyUnicode_AsUCS4(text, wide.as_mut_ptr(), length, 0).is_null() {
                return None;
            }
            wide
        };
        let to = self.head.get_mut(at..at + wide.len())?;
        let mut all = 0;
        for (to, from) in to.iter_mut().zip(&*wide) {
            *to = *from as u8;
            all |= from;
        }
        (all <= 0xff).then_some(at + wide.len())
    }

    fn append_bytes(&mut self, at: usize, bytes: &[u8]) -> Option<usize> {
        self.head.get_mut(at..at + bytes.len())?.copy_from_slice(bytes);
        Some(at + bytes.len())
    }

    /// A RESPONSE of `status` (as STATUSES has it), `headers` and `body`. With `promised`, if they have a Content-Length and
    /// it is the body's.
    unsafe fn frame(&mut self, id: u32, status: Ref, headers: Ref, body: Ref, promised: bool) -> Option<Own> {
        // SAFETY: no Python code runs in here, so what is borrowed stays, and types are seen before they are relied on. The new
        // object is filled before anybody sees it.
        unsafe {
            if !is(headers, &raw mut PyList_Type) || !is(body, &raw mut PyBytes_Type) || !is(status, &raw mut PyTuple_Type) {
                return None;
            }
            let body = bytes_of(body);
            let code = PyLong_AsUnsignedLong(PyTuple_GetItem(status, 0)) as u32;
            let mut at = self.append(PREFIX_BYTES, NonNull::new(PyTuple_GetItem(status, 1))?.as_ptr())?;
            let mut unpromised = promised;
            for index in 0..PyList_Size(headers) {
                let field = PyList_GetItem(headers, index);
                if !is(field, &raw mut PyTuple_Type) || PyTuple_Size(field) != 2 {
                    return None;
                }
                let start = at;
                let colon = self.append(start, PyTuple_GetItem(field, 0))?;
                let value = self.append_bytes(colon, b": ")?;
                let end = self.append(value, PyTuple_GetItem(field, 1))?;
                let (name, value) = (&self.head[start..colon], &self.head[value..end]);
                if name.contains(&b'\n') || value.contains(&b'\n') {
                    return None;
                }
                if unpromised && name.eq_ignore_ascii_case(b"content-length") {
                    let is_number = (1..10).contains(&value.len()) && value.iter().all(u8::is_ascii_digit);
                    if !is_number || value.iter().fold(0, |number, digit| number * 10 + usize::from(digit - b'0')) != body.len() {
                        return None;
                    }
                    unpromised = false;
                }
                at = self.append_bytes(end, b"\r\n")?;
            }
            let head_bytes = at - PREFIX_BYTES;
            if unpromised || head_bytes + body.len() > COPY_BYTES_MAX {
                return None;
            }
            let words = [(4 + head_bytes + body.len()) as u32, id, code, head_bytes as u32];
            for (to, word) in self.head.chunks_exact_mut(4).zip(words) {
                to.copy_from_slice(&word.to_le_bytes());
            }
            let frame = Own::new(PyBytes_FromStringAndSize(null(), (at + body.len()) as isize))?;
            let (head, rest) = slice::from_raw_parts_mut(PyBytes_AsString(frame.get()), at + body.len()).split_at_mut(at);
            head.copy_from_slice(&self.head[..at]);
            rest.copy_from_slice(body);
            Some(frame)
        }
    }
}

impl Bound {
    unsafe fn of<'a>(capsule: Ref) -> &'a Bound {
        // SAFETY: only `bind` makes functions with `serve` and `start_response`, each with its capsule, and never frees what
        // that points to.
        unsafe { &*PyCapsule_GetPointer(capsule, CAPSULE.as_ptr()).cast() }
    }

    unsafe fn set(&self, name: &Own, value: Ref) -> Option<()> {
        // SAFETY: both objects are ours, and the caller has the value.
        done(unsafe { PyObject_SetAttr(self.exchange.get(), name.get(), value) })
    }

    unsafe fn look(&self, name: &Own) -> Option<Own> {
        // SAFETY: both objects are ours.
        Own::new(unsafe { PyObject_GetAttr(self.exchange.get(), name.get()) })
    }

    /// Nothing happened that the hot loop does not know about.
    unsafe fn is_usual(&self) -> bool {
        // SAFETY: as `look`.
        unsafe { self.look(&self.names.rare) }.is_some_and(|rare| rare.get() == bool(false))
    }

    /// Fills the environ in, in the order in which `Channel.serve` does.
    unsafe fn fill(&self, environ: Ref, marshalled: &[u8], body: &[u8]) -> Option<()> {
        let mut reader = Reader(marshalled);
        if reader.take(2)? != [b')', PLACES as u8 + 1] {
            return None;
        }
        // SAFETY: the caller's environ is a dict. The scratch is used by no one else: strings and floats are made here, and
        // no Python code runs.
        unsafe {
            let scratch = &mut *self.scratch.get();
            let set = |key: Ref, value: &Own| done(PyDict_SetItem(environ, key, value.get()));
            for place in 0..PLACES {
                let value = scratch.value(&mut reader)?;
                if place == REMOTE_PORT && PyUnicode_GetLength(value.get()) == 0 {
                    continue;
                }
                set(NonNull::new(PyTuple_GetItem(self.places.get(), place as isize))?.as_ptr(), &value)?;
                if place == REQUEST_URI {
                    set(self.names.raw_uri.get(), &value)?;
                }
            }
            if reader.byte()? != b'{' {
                return None;
            }
            while reader.0.first()? == &b'Z' {
                let key = scratch.value(&mut reader)?;
                set(key.get(), &scratch.value(&mut reader)?)?;
            }
            if reader.0 != b"0" {
                return None;
            }
        }
        // SAFETY: Python code may run from here on, when the collector does. The body is in the caller's bytes object.
        unsafe {
            let content =
                if body.is_empty() { None } else { Some(Own::new(PyBytes_FromStringAndSize(body.as_ptr(), body.len() as isize))?) };
            let content = content.as_ref().map_or(null_mut(), Own::get);
            let input = Own::new(PyObject_CallFunctionObjArgs(self.make_input.get(), content, null_mut::<Object>()))?;
            done(PyDict_SetItem(environ, self.names.input.get(), input.get()))
        }
    }

    /// Puts the whole answer where the worker sends it from.
    unsafe fn answer(&self, id: u32, body: Ref, promised: bool) -> Option<()> {
        // SAFETY: the caller has the body, and `started` keeps the rest. The scratch is used by `frame` only.
        unsafe {
            let started = self.look(&self.names.started)?;
            if !is(started.get(), &raw mut PyTuple_Type) || PyTuple_Size(started.get()) != 2 {
                return None;
            }
            let (status, headers) = (PyTuple_GetItem(started.get(), 0), PyTuple_GetItem(started.get(), 1));
            if !is(status, &raw mut PyUnicode_Type) {
                return None;
            }
            // Not there, when no application has used it yet.
            let status = Own::to(NonNull::new(PyDict_GetItemWithError(self.statuses.get(), status))?.as_ptr());
            let frame = (*self.scratch.get()).frame(id, status.get(), headers, body, promised)?;
            done(PyList_Append(self.out.get(), frame.get()))
        }
    }

    /// Calls the application and answers with what it returns. `None`: there is something left to do.
    unsafe fn run(&self, id: u32, environ: Ref, start_response: Ref, may_wait: bool, left: &mut Left) -> Option<()> {
        let names = &self.names;
        // SAFETY: all objects are ours or in `left`, also while Python code runs.
        unsafe {
            let arguments = Own::new(PyTuple_Pack(2, environ, start_response))?;
            let result = Own::new(PyObject_Call(self.app.get(), arguments.get(), null_mut()))?;
            drop(arguments);
            let result = left.result.insert(result).get();
            let class = Own::new(PyObject_GetAttr(result, names.class.get()));
            if class.is_none() {
                PyErr_Clear();
            }
            // A proxy says that it is something else.
            let honest = class.is_some_and(|class| class.get() == (*result).kind);
            if !honest || !self.is_usual() || is(result, self.file_wrapper.get()) {
                return None;
            }
            if PyType_GetFlags((*result).kind) & LIST_OR_TUPLE != 0 {
                let body = match () {
                    () if is(result, &raw mut PyList_Type) && PyList_Size(result) == 1 => PyList_GetItem(result, 0),
                    () if is(result, &raw mut PyTuple_Type) && PyTuple_Size(result) == 1 => PyTuple_GetItem(result, 0),
                    () => return None,
                };
                return self.answer(id, body, false);
            }
            if may_wait {
                self.set(&names.may_wait, bool(true))?;
            }
            let iterator = left.iterator.insert(Own::new(PyObject_GetIter(result))?).get();
            left.piece = Own::new(PyIter_Next(iterator));
            let Some(piece) = &left.piece else {
                if PyErr_Occurred().is_null() {
                    // It must not be asked again.
                    left.iterator = Own::new(PyTuple_Pack(0));
                }
                return None;
            };
            if !is(piece.get(), &raw mut PyBytes_Type) || PyBytes_Size(piece.get()) == 0 || !self.is_usual() {
                return None;
            }
            // Of a body in one piece whose length is known, the application is asked for the end when the answer is whole.
            self.answer(id, piece.get(), true)?;
            left.piece = None;
            self.set(&names.begun, bool(true))?;
            self.set(&names.ended, bool(true))?;
            self.set(&names.remaining, self.zero.get())?;
            if !may_wait {
                Own::new(PyObject_CallFunctionObjArgs(self.flush.get(), null_mut::<Object>()))?;
            }
            left.piece = Own::new(PyIter_Next(iterator));
            if left.piece.is_some() || !PyErr_Occurred().is_null() {
                return None;
            }
            left.iterator = None;
            let result = left.result.take()?;
            match Own::new(PyObject_GetAttr(result.get(), names.close.get())) {
                None if PyErr_ExceptionMatches(PyExc_AttributeError) == 0 => return None,
                None => PyErr_Clear(),
                Some(close) if close.get() == none() => {}
                Some(close) => drop(Own::new(PyObject_CallFunctionObjArgs(close.get(), null_mut::<Object>()))?),
            }
            drop(result);
            self.set(&names.begun, bool(false))?;
            self.set(&names.ended, bool(false))?;
            self.set(&names.remaining, none())?;
            if may_wait {
                self.set(&names.may_wait, bool(false))?;
            }
            if !self.is_usual() {
                Own::new(PyObject_CallFunctionObjArgs(self.tidy.get(), self.exchange.get(), null_mut::<Object>()))?;
            }
        }
        Some(())
    }
}

/// The request at `at` in `data`, if it is there as a whole and nothing in it is unusual: its id, where it ends, and whether
/// its answer may wait for the next one's.
unsafe fn begin(bound: &Bound, data: Ref, at: Ref, environ: Ref, may_wait: Ref) -> Option<(u32, usize, bool)> {
    // SAFETY: the arguments of `serve` live until it returns.
    unsafe {
        if !is(data, &raw mut PyBytes_Type) {
            return None;
        }
        let (data, at) = (bytes_of(data), usize::try_from(PyLong_AsSsize_t(at)).ok()?);
        let mut reader = Reader(data.get(at..)?);
        let (payload_bytes, id, kind, environ_bytes) = (reader.u32()? as usize, reader.u32()?, reader.u32()?, reader.u32()?);
        let payload = reader.0.get(..payload_bytes.checked_sub(4)?)?;
        let (marshalled, body) = payload.split_at_checked(environ_bytes as usize)?;
        if kind != REQUEST {
            return None;
        }
        bound.fill(environ, marshalled, body)?;
        let number = Own::new(PyLong_FromUnsignedLong(c_ulong::from(id)))?;
        bound.set(&bound.names.id, number.get())?;
        bound.set(&bound.names.started, none())?;
        let stop = at + HEADER_BYTES + payload_bytes;
        Some((id, stop, may_wait == bool(true) && stop < data.len()))
    }
}

/// The exception that is set, as an object with its traceback.
unsafe fn caught() -> Option<Own> {
    let (mut kind, mut value, mut traceback) = (null_mut(), null_mut(), null_mut());
    // SAFETY: the three references are ours afterwards; each may be null.
    unsafe {
        PyErr_Fetch(&mut kind, &mut value, &mut traceback);
        PyErr_NormalizeException(&mut kind, &mut value, &mut traceback);
        drop(Own::new(kind));
        if let (Some(value), Some(traceback)) = (NonNull::new(value), Own::new(traceback)) {
            PyException_SetTraceback(value.as_ptr(), traceback.get());
        }
        Own::new(value)
    }
}

/// `serve(data, at, environ, start_response, may_wait)`: where the request ends, if all is done; None, if nothing is, beyond
/// what Python does to the environ as well; else what `Exchange.respond` has to go on with: (end, result, iterator, (piece)
/// or (), error).
unsafe extern "C" fn serve(own: Ref, arguments: Ref) -> Ref {
    let [mut data, mut at, mut environ, mut start_response, mut may_wait]: [Ref; 5] = [null_mut(); 5];
    // SAFETY: `arguments` is a tuple and lives until this returns, and with it what is in it.
    unsafe {
        let (data_to, at_to, environ_to) = (&raw mut data, &raw mut at, &raw mut environ);
        let (start_to, may_to) = (&raw mut start_response, &raw mut may_wait);
        if PyArg_UnpackTuple(arguments, c"serve".as_ptr(), 5, 5, data_to, at_to, environ_to, start_to, may_to) == 0 {
            return null_mut();
        }
        let bound = Bound::of(own);
        let Some((id, stop, may_wait)) = begin(bound, data, at, environ, may_wait) else {
            PyErr_Clear();
            return Own::to(none()).give();
        };
        let mut left = Left::default();
        if bound.run(id, environ, start_response, may_wait, &mut left).is_some() {
            return PyLong_FromLong(stop as c_long);
        }
        let error = caught();
        let (Some(stop), Some(piece)) = (
            Own::new(PyLong_FromLong(stop as c_long)),
            Own::new(match &left.piece {
                Some(piece) => PyTuple_Pack(1, piece.get()),
                None => PyTuple_Pack(0),
            }),
        ) else {
            return null_mut();
        };
        let or_none = |object: &Option<Own>| object.as_ref().map_or(none(), Own::get);
        PyTuple_Pack(5, stop.get(), or_none(&left.result), or_none(&left.iterator), piece.get(), or_none(&error))
    }
}

/// `Exchange.start_response`, called for the first time and with two arguments; else that itself.
unsafe extern "C" fn start_response(own: Ref, arguments: Ref, keywords: Ref) -> Ref {
    // SAFETY: `arguments` is a tuple that nothing changes any more.
    unsafe {
        let bound = Bound::of(own);
        let started = &bound.names.started;
        if PyTuple_Size(arguments) == 2 && keywords.is_null() && bound.look(started).is_some_and(|started| started.get() == none()) {
            return match bound.set(started, arguments) {
                Some(()) => Own::to(bound.write.get()).give(),
                None => null_mut(),
            };
        }
        PyObject_Call(bound.start_response.get(), arguments, keywords)
    }
}

unsafe fn make_bound(arguments: Ref) -> Option<Bound> {
    // SAFETY: `arguments` is a tuple; an index beyond its end is an exception. Zeroes are a valid `Scratch`.
    unsafe {
        let argument = |index| NonNull::new(PyTuple_GetItem(arguments, index)).map(|object| Own::to(object.as_ptr()));
        Some(Bound {
            exchange: argument(0)?,
            app: argument(1)?,
            statuses: argument(2)?,
            out: argument(3)?,
            make_input: argument(4)?,
            file_wrapper: argument(5)?,
            flush: argument(6)?,
            tidy: argument(7)?,
            start_response: argument(8)?,
            write: argument(9)?,
            places: argument(10)?,
            zero: Own::new(PyLong_FromLong(0))?,
            names: Names::new()?,
            scratch: UnsafeCell::new(mem::zeroed()),
        })
    }
}

/// `bind(exchange, app, statuses, out, BytesIO, FileWrapper, flush, tidy, start_response, write, PLACES)`: `serve`
/// and `start_response` of a channel.
unsafe extern "C" fn bind(_module: Ref, arguments: Ref) -> Ref {
    // SAFETY: the memory is of that size and never freed; PyMem_Malloc aligns as malloc(3) does.
    unsafe {
        let Some(bound) = make_bound(arguments) else { return null_mut() };
        let memory = PyMem_Malloc(size_of::<Bound>()).cast::<Bound>();
        if memory.is_null() {
            return PyErr_NoMemory();
        }
        memory.write(bound);
        let Some(capsule) = Own::new(PyCapsule_New(memory.cast(), CAPSULE.as_ptr(), null())) else { return null_mut() };
        let function = |method| Own::new(PyCFunction_NewEx(method, capsule.get(), null_mut()));
        let (Some(serve), Some(start_response)) = (function(&raw mut SERVE), function(&raw mut START_RESPONSE)) else { return null_mut() };
        PyTuple_Pack(2, serve.get(), start_response.get())
    }
}

// CPython keeps pointers to these, and writes to the last.
static mut SERVE: Method = method(c"serve", serve as *const c_void, ARGUMENTS);
static mut START_RESPONSE: Method = method(c"start_response", start_response as *const c_void, ARGUMENTS | KEYWORDS);
static mut METHODS: [Method; 2] =
    [method(c"bind", bind as *const c_void, ARGUMENTS), Method { name: null(), function: null(), flags: 0, doc: null() }];
static mut MODULE: Definition = Definition {
    head: Object { references: 1, kind: null_mut() },
    reserved: [null_mut(); 3],
    name: c"uringd_native".as_ptr(),
    doc: null(),
    state_bytes: -1,
    methods: (&raw mut METHODS).cast(),
    hooks: [null_mut(); 4],
};

const fn method(name: &CStr, function: *const c_void, flags: c_int) -> Method {
    Method { name: name.as_ptr(), function, flags, doc: null() }
}

/// What `import` calls.
#[unsafe(no_mangle)]
pub extern "C" fn PyInit_uringd_native() -> Ref {
    // SAFETY: called with the GIL; the definition is never freed. 3 is the version of the stable ABI.
    unsafe { PyModule_Create2(&raw mut MODULE, 3) }
}
