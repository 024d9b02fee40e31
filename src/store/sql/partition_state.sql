-- Where a partition stands, and the next closed day with messages after a given one. Primary keys.
-- $1 partition  $2 day
select p.day, p.low_watermark,
       (select d.day from shardmq.day d
         where d.partition = p.partition and d.day > $2 and not d.dropped
         order by d.day limit 1),
       pg_postmaster_start_time()
  from shardmq.partition p
 where p.partition = $1 and p.state <> 'deleted'
