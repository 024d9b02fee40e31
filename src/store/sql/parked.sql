-- Parked messages of a group that are due in these partitions and not in hand, oldest first: at most so
-- many, and over the first so many bytes; with how long until the next one is due, the server, and a time up to
-- which all that was due is among these, if there were not too many. What was due before $6 is left out: dead
-- entries at the left edge of the index stay while somebody holds a snapshot. Index
-- retry_due; one row without a message where none is due.
-- $1 group  $2 partitions  $3 those in hand  $4 how many  $5 bytes  $6 a time, or null
with now as materialized (
    select shardmq.clock() as clock, coalesce($6::timestamptz, timestamptz '-infinity') as since),
due as (
    select r.*, sum(octet_length(r.payload)) over (order by r.due_at, r.id) as sum_bytes
      from (select r.*
              from unnest($2::int[]) as p (partition)
             cross join lateral (
                   select * from shardmq.retry r
                    where r.group_name = $1 and r.partition = p.partition
                      and r.due_at > (select since from now) and r.due_at <= (select clock from now)
                      and r.id <> all ($3::uuid[])
                    order by r.due_at limit $4::int) r
             order by r.due_at, r.id limit $4::int) r)
select n.next_secs, pg_postmaster_start_time(), d.id, d.partition, d.message_id, d.producer, d.sequence,
       d.message_index, d.appended_at, d.first_seen, d.attempts, d.failures::text, array[d.key],
       array[d.headers], array[d.payload], octet_length(d.payload),
       (select clock from now) - interval '1 minute'
  from (select extract(epoch from min(r.due_at) - (select clock from now))::float8 as next_secs
          from unnest($2::int[]) as p (partition)
         cross join lateral (
               select r.due_at from shardmq.retry r
                where r.group_name = $1 and r.partition = p.partition and r.due_at > (select clock from now)
                order by r.due_at limit 1) r) n
  left join due d on d.sum_bytes - octet_length(d.payload) < $5::bigint
 order by d.due_at, d.id
