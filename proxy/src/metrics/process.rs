//! Metrics that are read when somebody asks: the process's own, and moments that may be unknown.
//!
//! Invariant: what is unknown is absent. A certificate's end that read 0 would be taken for an
//! expired one.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;

/// `sidegate_certificate_not_after_timestamp_seconds`, absent while there is no certificate.
#[derive(Clone, Debug, Default)]
pub(super) struct Moment(Arc<AtomicU64>);

impl Moment {
    pub(super) fn set(&self, seconds: u64) {
        self.0.store(seconds, Ordering::Relaxed);
    }
}

impl Collector for Moment {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let seconds = self.0.load(Ordering::Relaxed);
        if seconds == 0 {
            return Ok(());
        }
        let name = "sidegate_certificate_not_after_timestamp_seconds";
        let help = "End of the certificate in use, in seconds since 1970.";
        let metric = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        ConstGauge::new(i64::try_from(seconds).unwrap_or(i64::MAX)).encode(metric)
    }
}

/// `process_*`, as every Prometheus client has them, from `/proc/self`.
#[derive(Debug)]
pub(super) struct ProcessCollector;

impl Collector for ProcessCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let Some(process) = Process::read() else {
            return Ok(());
        };
        let cpu = encoder.encode_descriptor(
            "process_cpu_seconds",
            "Processor time used, in seconds.",
            None,
            MetricType::Counter,
        )?;
        ConstCounter::new(process.cpu_seconds).encode(cpu)?;
        for (name, help, value) in process.gauges() {
            let Some(value) = value else { continue };
            let metric = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            ConstGauge::new(value).encode(metric)?;
        }
        Ok(())
    }
}

/// One reading of `/proc/self`.
#[derive(Debug, Default)]
struct Process {
    cpu_seconds: f64,
    start_seconds: Option<f64>,
    threads: Option<f64>,
    virtual_bytes: Option<f64>,
    resident_bytes: Option<f64>,
    open_files: Option<f64>,
    files_max: Option<f64>,
}

impl Process {
    fn read() -> Option<Self> {
        let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
        // The second field is the program's name in brackets, and may itself hold spaces.
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        let number = |index: usize| fields.get(index).and_then(|text| text.parse::<f64>().ok());
        #[expect(clippy::cast_precision_loss, reason = "both are small")]
        let (ticks, page) = (
            rustix::param::clock_ticks_per_second() as f64,
            rustix::param::page_size() as f64,
        );
        let begin = number(19).map(|started| started / ticks);
        Some(Self {
            cpu_seconds: (number(11)? + number(12)?) / ticks,
            start_seconds: begin.and_then(|begin| Some(boot_seconds()? + begin)),
            threads: number(17),
            virtual_bytes: number(20),
            resident_bytes: number(21).map(|pages| pages * page),
            open_files: open_files(),
            files_max: files_max(),
        })
    }

    fn gauges(&self) -> [(&'static str, &'static str, Option<f64>); 6] {
        [
            (
                "process_start_time_seconds",
                "Start of the process, in seconds since 1970.",
                self.start_seconds,
            ),
            ("process_threads", "Threads of the process.", self.threads),
            (
                "process_virtual_memory_bytes",
                "Virtual memory, in bytes.",
                self.virtual_bytes,
            ),
            (
                "process_resident_memory_bytes",
                "Resident memory, in bytes.",
                self.resident_bytes,
            ),
            (
                "process_open_fds",
                "Open file descriptors.",
                self.open_files,
            ),
            (
                "process_max_fds",
                "Largest number of open file descriptors.",
                self.files_max,
            ),
        ]
    }
}

fn boot_seconds() -> Option<f64> {
    let stat = std::fs::read_to_string("/proc/stat").ok()?;
    let line = stat.lines().find_map(|line| line.strip_prefix("btime "))?;
    line.trim().parse().ok()
}

fn open_files() -> Option<f64> {
    let count = std::fs::read_dir("/proc/self/fd").ok()?.count();
    // The listing itself holds one open.
    u32::try_from(count.saturating_sub(1)).ok().map(f64::from)
}

fn files_max() -> Option<f64> {
    let limits = std::fs::read_to_string("/proc/self/limits").ok()?;
    let line = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max open files"))?;
    line.split_whitespace().next()?.parse().ok()
}
