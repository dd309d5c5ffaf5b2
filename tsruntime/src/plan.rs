//! A plan.tsp behind the engine's C ABI: mapped, checked, its entries in place.

use std::ffi::CString;
use std::path::Path;
use std::ptr::{self, NonNull};
use std::sync::Arc;

use bytes::Bytes;

use crate::engine::call;
use crate::error::{Exit, Failure};
use crate::ffi;

/// A mapped and checked plan.
pub struct Plan(NonNull<ffi::ts_plan>);

// engine.h: every function may be called from any thread; a plan's entries do not change.
unsafe impl Send for Plan {}
unsafe impl Sync for Plan {}

impl Plan {
    /// Maps the file and checks all but the weights.
    pub fn open(path: &Path, always_verify: bool) -> Result<Arc<Plan>, Failure> {
        let name = CString::new(path.as_os_str().as_encoded_bytes())
            .map_err(|_| Failure::new(Exit::Usage, "the plan's path has a NUL byte in it"))?;
        let mut plan = ptr::null_mut();
        call(|error| unsafe { ffi::ts_plan_open(name.as_ptr(), i32::from(always_verify), &mut plan, error) })?;
        Ok(Arc::new(Plan(NonNull::new(plan).expect("TS_OK comes with a plan"))))
    }

    /// An entry's bytes, in place; None if there is none of that name.
    pub fn entry(self: &Arc<Plan>, name: &str) -> Option<Bytes> {
        let name = CString::new(name).ok()?;
        let (mut data, mut size) = (ptr::null(), 0);
        let status = unsafe { ffi::ts_plan_entry(self.0.as_ptr(), name.as_ptr(), &mut data, &mut size) };
        (status == ffi::TS_OK).then(|| Bytes::from_owner(Entry { data, size, _plan: self.clone() }))
    }
}

impl Plan {
    /// For calls of the engine, while this lives.
    pub fn raw(&self) -> *mut ffi::ts_plan {
        self.0.as_ptr()
    }

    /// Processes that run it together.
    pub fn num_ranks(&self) -> i32 {
        unsafe { ffi::ts_plan_num_ranks(self.0.as_ptr()) }
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        unsafe { ffi::ts_plan_close(self.0.as_ptr()) }
    }
}

/// Bytes of a plan, which they keep mapped.
struct Entry {
    data: *const u8,
    size: usize,
    _plan: Arc<Plan>,
}

unsafe impl Send for Entry {}

impl AsRef<[u8]> for Entry {
    fn as_ref(&self) -> &[u8] {
        if self.size == 0 {
            return &[];
        }
        // Valid and unchanged until ts_plan_close, says engine.h; `_plan` has not been dropped.
        unsafe { std::slice::from_raw_parts(self.data, self.size) }
    }
}
