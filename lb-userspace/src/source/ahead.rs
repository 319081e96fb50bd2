//! Work on many things at a time, with the results in the order of the things.
//!
//! In: things, what is to be made of each on any thread. Out: what was made, one after another. Never here: what it is.

use std::{
    collections::BTreeMap,
    num::NonZero,
    sync::{
        atomic::{AtomicUsize, Ordering},
        mpsc::sync_channel,
    },
    thread,
};

/// More threads than this would wait for the one that takes the results.
const MOST_THREADS: usize = 8;

/// Makes something of each thing, on as many threads as there are processors, and takes it in the order of the things.
///
/// # Panics
///
/// If making or taking something does.
pub(super) fn each<T: Sync, R: Send>(things: &[T], make: impl Fn(&T) -> R + Sync, mut take: impl FnMut(&T, R)) {
    // One file is the usual change, and to ask for the number of CPUs takes as long as to read it.
    let most = if things.len() < 2 { 1 } else { thread::available_parallelism().map_or(1, NonZero::get) };
    let threads = most.min(things.len()).min(MOST_THREADS);
    if threads < 2 {
        return things.iter().for_each(|thing| take(thing, make(thing)));
    }
    let next = AtomicUsize::new(0);
    thread::scope(|scope| {
        // Who makes faster than things are taken waits.
        let (sender, made) = sync_channel(1);
        for _ in 0..threads {
            let (sender, next, make) = (sender.clone(), &next, &make);
            scope.spawn(move || {
                while let Some((index, thing)) =
                    Some(next.fetch_add(1, Ordering::Relaxed)).and_then(|index| Some((index, things.get(index)?)))
                    && sender.send((index, make(thing))).is_ok()
                {}
            });
        }
        drop(sender);
        let mut early = BTreeMap::new();
        let mut due = 0;
        for (index, result) in made {
            early.insert(index, result);
            while let Some(result) = early.remove(&due) {
                take(&things[due], result);
                due += 1;
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn results_come_in_the_order_of_the_things() {
        for count in [0, 1, 2, 100_u64] {
            let things: Vec<u64> = (0..count).collect();
            let mut taken = Vec::new();
            let slow = |thing: &u64| {
                thread::sleep(Duration::from_micros(500 * (thing % 3)));
                thing * thing
            };
            each(&things, slow, |thing, square| taken.push((*thing, square)));
            assert_eq!(taken, things.iter().map(|thing| (*thing, thing * thing)).collect::<Vec<_>>());
        }
    }
}
