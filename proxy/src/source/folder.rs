//! A folder of resource files, watched.
//!
//! Invariants: what is handed on was read twice, at least the settle time apart, with the same
//! result, since a file that is still being written is often valid and wider; a folder that cannot
//! be read is a lost source, never an empty one; a missed notification costs one interval, because
//! the folder is read again without any.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use notify::{RecommendedWatcher, RecursiveMode, Watcher};
use sidegate_mesh::Clock;
use tokio::sync::Notify;
use tracing::warn;

use crate::config::LimitsConfig;

/// Folders within folders.
const DEPTH_MAX: usize = 8;
/// Scans in a row that may each differ from the one before.
const SCANS_MAX: usize = 100;

/// The resource files of a folder, by path.
pub(crate) type Files = BTreeMap<String, Content>;

/// What one file holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    /// Its text.
    Text(Arc<str>),
    /// Why it has none.
    Unusable(String),
}

/// Why the folder says nothing, which is not the same as saying that there is nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Lost {
    /// It cannot be read.
    #[error("the resources folder {} cannot be read: {reason}", path.display())]
    Unreadable { path: PathBuf, reason: String },
    /// It has more than it may.
    #[error("the resources folder {} has more than {max} files or folders", path.display())]
    TooMany { path: PathBuf, max: usize },
    /// No two scans agree.
    #[error("the resources folder {} does not come to rest", path.display())]
    Restless { path: PathBuf },
}

/// One folder, followed.
pub(crate) struct Folder {
    path: PathBuf,
    bounds: Bounds,
    settle: Duration,
    reread: Duration,
    clock: Arc<dyn Clock>,
    changed: Arc<Notify>,
    watcher: Option<(RecommendedWatcher, (u64, u64))>,
    last: Option<Result<Files, Lost>>,
}

#[derive(Clone, Copy)]
struct Bounds {
    files: usize,
    file_bytes: u64,
}

impl Folder {
    /// Follows `path`, within the bounds of `limits`.
    pub(crate) fn new(path: PathBuf, limits: &LimitsConfig, clock: Arc<dyn Clock>) -> Self {
        Self {
            path,
            bounds: Bounds {
                files: limits.resource_files_max as usize,
                file_bytes: u64::from(limits.resource_file_bytes_max),
            },
            settle: limits.resources_settle_time,
            reread: limits.resources_reread_interval,
            clock,
            changed: Arc::new(Notify::new()),
            watcher: None,
            last: None,
        }
    }

    /// Waits until the folder, at rest, differs from what this returned before.
    pub(crate) async fn next(&mut self) -> Result<Files, Lost> {
        loop {
            self.watch();
            let scan = self.settled().await;
            if self.last.as_ref() != Some(&scan) {
                self.last = Some(scan.clone());
                return scan;
            }
            tokio::select! {
                () = self.changed.notified() => {}
                () = self.clock.sleep(self.reread) => {}
            }
        }
    }

    /// Two equal scans.
    async fn settled(&self) -> Result<Files, Lost> {
        let mut earlier = self.scan().await;
        for _ in 0..SCANS_MAX {
            self.clock.sleep(self.settle).await;
            let later = self.scan().await;
            if later == earlier {
                return later;
            }
            earlier = later;
        }
        Err(Lost::Restless {
            path: self.path.clone(),
        })
    }

    async fn scan(&self) -> Result<Files, Lost> {
        let (path, bounds) = (self.path.clone(), self.bounds);
        let scan = tokio::task::spawn_blocking(move || scan(&path, bounds)).await;
        scan.unwrap_or_else(|error| {
            Err(Lost::Unreadable {
                path: self.path.clone(),
                reason: error.to_string(),
            })
        })
    }

    /// Watches the folder that has the path now: it may have been replaced by another.
    fn watch(&mut self) {
        let identity = std::fs::metadata(&self.path).map(|folder| (folder.dev(), folder.ino()));
        let Ok(identity) = identity else {
            self.watcher = None;
            return;
        };
        if self
            .watcher
            .as_ref()
            .is_some_and(|(_, watched)| *watched == identity)
        {
            return;
        }
        let changed = Arc::clone(&self.changed);
        // Any event, an error as well, means that the folder must be read.
        let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            if !event.is_ok_and(|event| event.kind.is_access() && !is_written(&event)) {
                changed.notify_one();
            }
        });
        let following = watcher.and_then(|mut watcher| {
            watcher.watch(&self.path, RecursiveMode::Recursive)?;
            Ok(watcher)
        });
        match following {
            Ok(watcher) => self.watcher = Some((watcher, identity)),
            Err(error) => {
                let interval = self.reread;
                warn!(%error, ?interval, "the resources folder is only read at intervals");
                self.watcher = None;
            }
        }
    }
}

/// Our own reading must not look like a change.
fn is_written(event: &notify::Event) -> bool {
    use notify::event::{AccessKind, AccessMode};
    event.kind == notify::EventKind::Access(AccessKind::Close(AccessMode::Write))
}

fn scan(path: &Path, bounds: Bounds) -> Result<Files, Lost> {
    let mut files = Files::new();
    let mut folders = vec![(path.to_owned(), 0)];
    let mut entries = 0;
    while let Some((folder, depth)) = folders.pop() {
        for name in names(path, &folder)? {
            entries += 1;
            if entries > bounds.files {
                return Err(Lost::TooMany {
                    path: path.to_owned(),
                    max: bounds.files,
                });
            }
            let entry = folder.join(&name);
            // Links are followed: a `ConfigMap`'s files are links into its hidden folder.
            match std::fs::metadata(&entry) {
                Ok(kind) if kind.is_dir() && depth < DEPTH_MAX => folders.push((entry, depth + 1)),
                Ok(kind) if kind.is_dir() => {
                    let unusable = Content::Unusable("too many folders within folders".to_owned());
                    files.insert(entry.display().to_string(), unusable);
                }
                _ if !sidegate_mesh::resource::is_resource_file(&entry) => {}
                Ok(kind) if kind.is_file() => {
                    files.insert(entry.display().to_string(), read(&entry, bounds));
                }
                Ok(_) => {
                    let unusable = Content::Unusable("not a file".to_owned());
                    files.insert(entry.display().to_string(), unusable);
                }
                Err(error) => {
                    let unusable = Content::Unusable(error.to_string());
                    files.insert(entry.display().to_string(), unusable);
                }
            }
        }
    }
    Ok(files)
}

/// The names in one folder; hidden ones are an editor's or a `ConfigMap`'s own.
fn names(root: &Path, folder: &Path) -> Result<Vec<std::ffi::OsString>, Lost> {
    let lost = |error: std::io::Error| Lost::Unreadable {
        path: root.to_owned(),
        reason: if folder == root {
            error.to_string()
        } else {
            format!("{}: {error}", folder.display())
        },
    };
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(lost)? {
        let name = entry.map_err(lost)?.file_name();
        if !name.as_encoded_bytes().starts_with(b".") {
            names.push(name);
        }
    }
    Ok(names)
}

fn read(path: &Path, bounds: Bounds) -> Content {
    let mut bytes = Vec::new();
    let read =
        File::open(path).and_then(|file| file.take(bounds.file_bytes + 1).read_to_end(&mut bytes));
    match read {
        Err(error) => Content::Unusable(error.to_string()),
        Ok(_) if bytes.len() as u64 > bounds.file_bytes => {
            Content::Unusable(format!("larger than {} bytes", bounds.file_bytes))
        }
        Ok(_) => match String::from_utf8(bytes) {
            Ok(text) => Content::Text(text.into()),
            Err(error) => Content::Unusable(format!("not UTF-8: {error}")),
        },
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use sidegate_mtls::SystemClock;

    use super::*;

    struct Fixture {
        root: tempfile::TempDir,
        folder: Folder,
    }

    fn fixture(limits: &LimitsConfig) -> Fixture {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("resources");
        std::fs::create_dir(&path).unwrap();
        let folder = Folder::new(path, limits, Arc::new(SystemClock));
        Fixture { root, folder }
    }

    impl Fixture {
        fn path(&self, name: &str) -> PathBuf {
            self.root.path().join("resources").join(name)
        }

        fn write(&self, name: &str, text: &str) {
            std::fs::write(self.path(name), text).unwrap();
        }
    }

    /// Notifications alone must do: nothing is read again without one for an hour.
    fn patient() -> LimitsConfig {
        LimitsConfig {
            resources_reread_interval: Duration::from_hours(1),
            ..LimitsConfig::default()
        }
    }

    /// Only the slow reading, many times a second.
    fn hasty() -> LimitsConfig {
        LimitsConfig {
            resources_reread_interval: Duration::from_millis(20),
            ..LimitsConfig::default()
        }
    }

    fn texts(files: &Files) -> Vec<(&str, &str)> {
        let name = |path: &'_ str| path.rsplit('/').next().unwrap().len();
        files
            .iter()
            .map(|(path, content)| match content {
                Content::Text(text) => (&path[path.len() - name(path)..], &**text),
                Content::Unusable(reason) => (&path[path.len() - name(path)..], reason.as_str()),
            })
            .collect()
    }

    #[tokio::test]
    async fn a_saved_file_is_seen_by_its_notification() {
        let mut at = fixture(&patient());
        at.write("a.yaml", "one");
        assert_eq!(texts(&at.folder.next().await.unwrap()), [("a.yaml", "one")]);
        let saved = Instant::now();
        at.write("a.yaml", "two");
        assert_eq!(texts(&at.folder.next().await.unwrap()), [("a.yaml", "two")]);
        let took = saved.elapsed();
        assert!(
            took >= Duration::from_millis(100),
            "two scans lie apart: {took:?}"
        );
    }

    #[tokio::test]
    async fn a_name_in_capitals_hides_no_policy() {
        let mut at = fixture(&hasty());
        at.write("DENY.YAML", "deny");
        at.write("notes.txt", "no policy");
        assert_eq!(
            texts(&at.folder.next().await.unwrap()),
            [("DENY.YAML", "deny")]
        );
    }

    #[tokio::test]
    async fn a_file_that_is_still_being_written_is_never_handed_on() {
        let mut at = fixture(&hasty());
        let lines: Vec<String> = (0..40).map(|line| format!("line {line}\n")).collect();
        let whole = lines.concat();
        at.write("a.yaml", &whole);
        at.folder.next().await.unwrap();
        let path = at.path("a.yaml");
        let again = whole.replace("line", "Line");
        let written = again.clone();
        let writer = std::thread::spawn(move || {
            let mut file = File::create(path).unwrap();
            for line in written.lines() {
                std::io::Write::write_all(&mut file, format!("{line}\n").as_bytes()).unwrap();
                std::thread::sleep(Duration::from_millis(10));
            }
        });
        let seen = at.folder.next().await.unwrap();
        assert_eq!(texts(&seen), [("a.yaml", again.as_str())]);
        writer.join().unwrap();
    }

    #[tokio::test]
    async fn a_vanished_folder_is_lost_and_a_new_one_is_found() {
        let mut at = fixture(&hasty());
        at.write("a.yaml", "one");
        at.folder.next().await.unwrap();
        let (here, away) = (
            at.root.path().join("resources"),
            at.root.path().join("away"),
        );
        std::fs::rename(&here, &away).unwrap();
        let lost = at.folder.next().await.unwrap_err();
        assert!(matches!(lost, Lost::Unreadable { .. }), "{lost}");
        std::fs::create_dir(&here).unwrap();
        assert!(
            at.folder.next().await.unwrap().is_empty(),
            "an emptied folder is empty"
        );
        at.write("b.yaml", "two");
        assert_eq!(texts(&at.folder.next().await.unwrap()), [("b.yaml", "two")]);
    }

    #[tokio::test]
    async fn a_config_maps_links_and_nested_folders_are_followed() {
        let mut at = fixture(&hasty());
        std::fs::create_dir(at.path("..1")).unwrap();
        std::fs::write(at.path("..1/a.yaml"), "one").unwrap();
        std::os::unix::fs::symlink("..1", at.path("..data")).unwrap();
        std::os::unix::fs::symlink("..data/a.yaml", at.path("a.yaml")).unwrap();
        std::fs::create_dir(at.path("nested")).unwrap();
        at.write("nested/b.json", "{}");
        at.write("notes.txt", "no resource");
        at.write(".a.yaml.swp", "an editor's");
        let expected = [("a.yaml", "one"), ("b.json", "{}")];
        assert_eq!(texts(&at.folder.next().await.unwrap()), expected);
        std::fs::create_dir(at.path("..2")).unwrap();
        std::fs::write(at.path("..2/a.yaml"), "two").unwrap();
        std::os::unix::fs::symlink("..2", at.path("..next")).unwrap();
        std::fs::rename(at.path("..next"), at.path("..data")).unwrap();
        let expected = [("a.yaml", "two"), ("b.json", "{}")];
        assert_eq!(texts(&at.folder.next().await.unwrap()), expected);
    }

    #[tokio::test]
    async fn what_cannot_be_a_file_of_resources_is_said() {
        let mut at = fixture(&LimitsConfig {
            resource_file_bytes_max: 8,
            ..hasty()
        });
        at.write("big.yaml", "123456789");
        std::fs::write(at.path("latin.yaml"), b"\xff").unwrap();
        std::os::unix::fs::symlink("nowhere", at.path("dangling.yaml")).unwrap();
        let files = at.folder.next().await.unwrap();
        let texts = texts(&files);
        assert_eq!(texts[0], ("big.yaml", "larger than 8 bytes"));
        assert!(texts[1].1.contains("No such file"), "{texts:?}");
        assert!(texts[2].1.starts_with("not UTF-8"), "{texts:?}");
    }

    #[tokio::test]
    async fn too_many_files_are_a_lost_source() {
        let mut at = fixture(&LimitsConfig {
            resource_files_max: 2,
            ..hasty()
        });
        for name in ["a.yaml", "b.yaml", "c.yaml"] {
            at.write(name, "x");
        }
        let lost = at.folder.next().await.unwrap_err();
        assert!(matches!(lost, Lost::TooMany { max: 2, .. }), "{lost}");
    }
}
