//! Where the command line asks the running agent.
//!
//! An abstract socket, named by the folder of pins: it leaves nothing behind, whatever ends the agent. A question is a
//! line, its answer JSON until the end of the stream. Only root is answered.

use std::{
    fs,
    io::{Read as _, Write as _},
    os::{
        linux::net::SocketAddrExt as _,
        unix::{
            fs::MetadataExt as _,
            net::{SocketAddr, UnixListener as StdListener, UnixStream as StdStream},
        },
    },
    path::Path,
    time::Duration,
};

use anyhow::{Context as _, Result};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{UnixListener, UnixStream},
    sync::mpsc,
    time::timeout,
};

/// How long either side waits for the other.
const PATIENCE: Duration = Duration::from_secs(2);

/// What can be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Question {
    /// A [`Report`](super::report::Report).
    Status,
    /// A list of [`ServiceReport`](super::report::ServiceReport)s.
    Services,
}

impl Question {
    const fn word(self) -> &'static str {
        match self {
            Self::Status => "status",
            Self::Services => "services",
        }
    }

    fn of_word(word: &str) -> Option<Self> {
        [Self::Status, Self::Services].into_iter().find(|question| question.word() == word.trim())
    }
}

/// The agent's side.
#[derive(Debug)]
pub struct Door {
    asked: mpsc::Receiver<(Question, Answer)>,
}

impl Door {
    /// Begins to listen. Within a Tokio runtime.
    ///
    /// # Errors
    ///
    /// When the folder is not there or another agent listens.
    pub fn open(bpffs: &Path) -> Result<Self> {
        let listener = StdListener::bind_addr(&address(bpffs)?).context("cannot listen for the command line")?;
        listener.set_nonblocking(true)?;
        let listener = UnixListener::from_std(listener)?;
        let (sender, asked) = mpsc::channel(16);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                if let Some(question) = hear(stream).await
                    && sender.send(question).await.is_err()
                {
                    break;
                }
            }
        });
        Ok(Self { asked })
    }

    /// Waits for a question; for ever, if the socket has failed.
    pub async fn next(&mut self) -> (Question, Answer) {
        match self.asked.recv().await {
            Some(question) => question,
            None => std::future::pending().await,
        }
    }
}

/// Whoever asks nothing, or isn't root, is not heard.
async fn hear(mut stream: UnixStream) -> Option<(Question, Answer)> {
    if stream.peer_cred().ok()?.uid() != 0 {
        return None;
    }
    let mut word = [0; 16];
    let read = timeout(PATIENCE, stream.read(&mut word)).await.ok()?.ok()?;
    let question = Question::of_word(str::from_utf8(word.get(..read)?).ok()?)?;
    Some((question, Answer { stream }))
}

/// Who waits for an answer.
#[derive(Debug)]
pub struct Answer {
    stream: UnixStream,
}

impl Answer {
    /// Answers, if the other side is still there and reads; nobody waits for that.
    pub fn send(mut self, text: String) {
        tokio::spawn(async move {
            let _ = timeout(PATIENCE, self.stream.write_all(text.as_bytes())).await;
        });
    }
}

/// Asks the agent that has this folder. `None`: none runs.
#[must_use]
pub fn ask<T: serde::de::DeserializeOwned>(bpffs: &Path, question: Question) -> Option<T> {
    let mut stream = StdStream::connect_addr(&address(bpffs).ok()?).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).ok()?;
    // One write: an agent that has read the word alone may have answered and closed before the line's end is there.
    stream.write_all(format!("{}\n", question.word()).as_bytes()).ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    serde_json::from_str(&text).ok()
}

fn address(bpffs: &Path) -> Result<SocketAddr> {
    let folder = fs::metadata(bpffs).with_context(|| format!("{} (--bpffs)", bpffs.display()))?;
    Ok(SocketAddr::from_abstract_name(format!("fairlead/{:x}/{:x}", folder.dev(), folder.ino()))?)
}
