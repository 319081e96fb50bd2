//! Answers with the headers that kube-proxy's have.
//!
//! In: a status and a text. Out: a response. Never here: what the text says.

use axum::{
    body::Body,
    http::{HeaderValue, Response, StatusCode, header},
};

/// JSON.
pub const JSON: HeaderValue = HeaderValue::from_static("application/json");
/// Plain text.
pub const TEXT: HeaderValue = HeaderValue::from_static("text/plain; charset=utf-8");

/// An answer of this type, which no browser should take for another.
#[must_use]
pub fn answer(status: StatusCode, content_type: HeaderValue, body: impl Into<Body>) -> Response<Body> {
    let mut response = Response::new(body.into());
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, content_type);
    response.headers_mut().insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

/// What Go's server says of a path that it doesn't know.
pub async fn not_found() -> Response<Body> {
    answer(StatusCode::NOT_FOUND, TEXT, "404 page not found\n")
}
