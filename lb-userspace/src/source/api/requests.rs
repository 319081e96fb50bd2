//! Requests to API servers, counted as client-go counts them.
//!
//! In: each request and how it ended. Out: `rest_client_requests_total`. A watch counts when the server begins to answer.

use std::task::{Context, Poll};

use anyhow::Result;
use axum::http::{Request, Response};
use futures::{FutureExt as _, future::BoxFuture};
use prometheus::{IntCounterVec, Opts};
use tower::Service;

/// What client-go says instead of a status where there was no answer.
const NO_ANSWER: &str = "<error>";

/// How many requests were made, by code, host and method.
#[derive(Clone, Debug)]
pub struct Requests(IntCounterVec);

impl Requests {
    /// None yet.
    ///
    /// # Errors
    ///
    /// When the metric has a name that can't be, which no input leads to.
    pub fn new() -> Result<Self> {
        let help = "[ALPHA] Number of HTTP requests, partitioned by status code, method, and host.";
        let labels = &["code", "host", "method"];
        Ok(Self(IntCounterVec::new(Opts::new("rest_client_requests_total", help), labels)?))
    }

    /// What Prometheus reads.
    #[must_use]
    pub fn collector(&self) -> IntCounterVec {
        self.0.clone()
    }
}

/// A client's service, with every request counted; `answered` hears of those that succeed.
#[derive(Clone, Debug)]
pub(super) struct Counted<S, F> {
    pub(super) inner: S,
    pub(super) requests: Requests,
    pub(super) host: String,
    pub(super) answered: F,
}

impl<S, F, A, B> Service<Request<A>> for Counted<S, F>
where
    S: Service<Request<A>, Response = Response<B>>,
    S::Future: Send + 'static,
    F: Fn() + Clone + Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<S::Response, S::Error>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<A>) -> Self::Future {
        let method = request.method().clone();
        let (counter, host, answered) = (self.requests.collector(), self.host.clone(), self.answered.clone());
        let count = move |result: &Result<Response<B>, S::Error>| {
            let status = result.as_ref().ok().map(Response::status);
            let code = status.as_ref().map_or(NO_ANSWER, |status| status.as_str());
            counter.with_label_values(&[code, &host, method.as_str()]).inc();
            if status.is_some_and(|status| status.is_success()) {
                answered();
            }
        };
        self.inner.call(request).inspect(count).boxed()
    }
}
