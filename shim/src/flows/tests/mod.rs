//! Tests with maps that are made up.
