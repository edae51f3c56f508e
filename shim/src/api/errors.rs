//! The one place where failures become RPC codes.
//!
//! The codes matter: containerd stops and removes containers by telling "not found" from "internal".

use containerd_shim::protos::ttrpc::{self, Code, get_status};

use crate::sandbox::SandboxError;
use crate::sandbox::state::Refusal;

/// containerd's code for a failure of the sandbox.
fn code(error: &SandboxError) -> Code {
    match error {
        SandboxError::Name(_) | SandboxError::Refused(_) => Code::INVALID_ARGUMENT,
        // runc's shim answers "not found" for a process that has finished.
        SandboxError::NotFound { .. } | SandboxError::State { refusal: Refusal::Finished, .. } => {
            Code::NOT_FOUND
        }
        SandboxError::Exists { .. } => Code::ALREADY_EXISTS,
        SandboxError::State { refusal: Refusal::Precondition { .. }, .. } => {
            Code::FAILED_PRECONDITION
        }
        SandboxError::NotStarted { .. } | SandboxError::Host { .. } => Code::INTERNAL,
        SandboxError::Ended { .. } => Code::UNAVAILABLE,
        SandboxError::Guest { source, .. } => source.code(),
    }
}

/// A failure of the sandbox as a reply.
pub fn to_rpc(error: SandboxError) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(get_status(code(&error), error.to_string()))
}

/// A request that can never work.
pub fn invalid(text: impl std::fmt::Display) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(get_status(Code::INVALID_ARGUMENT, text.to_string()))
}

/// A request that Joey does not serve.
pub fn unimplemented(text: impl std::fmt::Display) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(get_status(Code::UNIMPLEMENTED, text.to_string()))
}
