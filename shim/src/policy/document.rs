//! Policy documents: the objects of the files that the operator applies.

use serde_json::Value;

/// An object with where it came from.
#[derive(Debug, Clone, PartialEq)]
pub struct Document {
    /// File and number in it.
    pub source: String,
    /// The object, as it was written.
    pub object: Value,
}

/// All policy documents.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Documents(pub Vec<Document>);
